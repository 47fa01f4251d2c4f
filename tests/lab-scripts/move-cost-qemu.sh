# The same guest as a machine of QEMU's own, which `qemu` is: it goes on from /peer/state, and moves from one process to
# another as often. What each move cost, as `query-migrate` says it, and when it stood still and ran again, as both tell.

# peer N [options]: the N-th process, in the background. Its console is qemu-N.log, its control socket port 4400 + N.
peer() {
    at=$1
    shift
    : >qemu-$at.log
    qemu -chardev file,id=console,path=qemu-$at.log -qmp tcp:127.0.0.1:$((4400 + at)),server=on,wait=off "$@" >qemu-$at-said.log 2>&1 &
    peer=$!
}
# works N COUNT: waits until it has worked so often in the N-th process.
works() {
    until_true "QEMU's guest does not work" \
        "kill -0 $peer || fail 'QEMU has ended'; [ \$(grep -c TICK qemu-$1.log) -ge $2 ]"
    ! grep -q BAD qemu-$1.log || fail "QEMU's guest has worked wrong"
}
# talk FD N: to the control socket of the N-th process, which is heard in talk-FD.log.
talk() {
    rm -f talk-$1
    mkfifo talk-$1
    nc 127.0.0.1 $((4400 + $2)) <talk-$1 >talk-$1.log &
    eval "exec $1>talk-$1"
    echo '{"execute":"qmp_capabilities"}' >&$1
}
# heard FD WHAT: waits for it.
heard() { until_true "QEMU does not say $2" "grep -qE '$2' talk-$1.log"; }

peer 0 -incoming file:/peer/state
works 0 1
begun=$(uptime)
works 0 4
pace qemu 3 $begun
move=0
while [ $move -lt $MOVES ]; do
    from=$move source=$peer
    move=$((move + 1))
    peer $move -incoming tcp:127.0.0.1:$((7200 + move))
    listens $((7200 + move))
    talk 3 $from
    talk 4 $move
    for asks in '"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}' \
        "\"migrate-set-parameters\",\"arguments\":{\"downtime-limit\":$DOWNTIME}" \
        "\"migrate\",\"arguments\":{\"uri\":\"tcp:127.0.0.1:$((7200 + move))\"}"; do
        echo "{\"execute\":$asks}" >&3
    done
    heard 3 '"status": "(completed|failed)"'
    echo '{"execute":"query-migrate"}' >&3
    heard 3 '"return": .*"status"'
    echo "QEMU-MOVE $(grep '"return": .*"status"' talk-3.log)"
    heard 4 '"RESUME"'
    echo "QEMU-STOP $(grep '"STOP"' talk-3.log)"
    echo "QEMU-RESUME $(grep '"RESUME"' talk-4.log)"
    echo '{"execute":"quit"}' >&3
    exec 3>&- 4>&-
    wait $source
    works $move 1
done
kill $peer
echo "QEMU-MOVES-OK"
