# The same guest as a machine of QEMU's own, which `qemu` is: it goes on from /peer/state, and moves from one process to
# another as often. What each move cost, as `query-migrate` says it, and when it stood still and ran again, as both tell.

# peer N [options]: the N-th process, in the background. Its console is qemu-N.log, its control socket port 4400 + N.
peer() {
    at=$1
    shift
    qemu -chardev file,id=console,path=qemu-$at.log -qmp tcp:127.0.0.1:$((4400 + at)),server=on,wait=off "$@" >qemu-$at.err 2>&1 &
    peer=$!
}
# works N COUNT: waits until it has worked so often in the N-th process.
works() {
    until [ "$(grep -c TICK qemu-$1.log 2>/dev/null)" -ge $2 ] 2>/dev/null; do
        kill -0 $peer 2>/dev/null || fail "QEMU has ended: $(cat qemu-$1.err)"
        ! grep -q BAD qemu-$1.log || fail "QEMU's guest has worked wrong"
        sleep 0.2
    done
}
# said WHAT: waits until QEMU has said it last.
said() { until_true "QEMU does not say $1" "tail -n 1 said | grep -qE '$1' || { cat said >qemu.log; false; }"; }

peer 0 -incoming file:/peer/state
works 0 1
begun=$(uptime)
works 0 4
pace qemu 3 $begun
move=0
while [ $move -lt $MOVES ]; do
    from=$((4400 + move)) source=$peer
    move=$((move + 1))
    peer $move -incoming tcp:127.0.0.1:$((7200 + move))
    listens $((7200 + move))
    rm -f asked asked-there
    mkfifo asked asked-there
    nc 127.0.0.1 $from <asked >said &
    exec 3>asked
    nc 127.0.0.1 $((4400 + move)) <asked-there >said-there &
    exec 4>asked-there
    echo '{"execute":"qmp_capabilities"}' >&4
    for asks in '"qmp_capabilities"' \
        '"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}' \
        '"migrate-set-parameters","arguments":{"downtime-limit":300}' \
        "\"migrate\",\"arguments\":{\"uri\":\"tcp:127.0.0.1:$((7200 + move))\"}"; do
        echo "{\"execute\":$asks}" >&3
    done
    until_true "QEMU does not move it: $(cat said)" "grep -qE '\"status\": \"(completed|failed)\"' said"
    echo '{"execute":"query-migrate"}' >&3
    said '"return":.*"status":'
    echo "QEMU-MOVE $(tail -n 1 said)"
    until_true "QEMU's guest does not run there" "grep -q '\"RESUME\"' said-there"
    echo "QEMU-STOP $(grep '"STOP"' said)"
    echo "QEMU-RESUME $(grep '"RESUME"' said-there)"
    echo '{"execute":"quit"}' >&3
    exec 3>&- 4>&-
    wait $source
    works $move 1
done
kill $peer
echo "QEMU-MOVES-OK"
