# Runs in an instance: kill -9 of a VMM at random moments of its life, beside a VM that
# works on. Nothing is left behind, names are free again, and the module stays while it
# is in use.
#   ROUNDS  how often; SEED  which moments
rounds=${ROUNDS:-5}
seed=${SEED:-1}
echo "seed $seed, $rounds rounds"
now() { awk '{ print int($1 * 100) }' /proc/uptime; }
victim() {
    : >victim.log
    blanket run --name victim --kernel /guest/vmlinuz --initrd tick.img --memory 128M --cpus 2 \
        --cmdline "quiet panic=-1" --console file:victim.log </dev/null >victim.out 2>&1 &
    pid=$!
}

# One life to know how long it takes, and for what the first one leaves in caches.
begin=$(now)
victim
until [ -n "$(ticks victim)" ]; do kill -0 $pid || fail "$(cat victim.out)"; sleep 0.1; done
life=$(($(now) - begin))
kill -9 $pid
wait $pid
snapshot

start neighbour
ticking neighbour
if [ "$BLANKET_HOST" = module ]; then
    if rmmod blanket 2>rmmod.log; then fail "the module went away under a VM"; fi
    grep -q "unavailable\|in use" rmmod.log || fail "no clear word of rmmod"
    ticking neighbour 1
    echo "ok: rmmod is refused: $(cat rmmod.log)"
fi
round=0
while [ $round -lt $rounds ]; do
    # From the first instruction to a while after it has begun to work.
    random $((life * 3 / 2))
    victim
    sleep "$(awk -v n=$random 'BEGIN { print n / 100 }')"
    state=$(tr -d '\r' <victim.log | tail -n 1)
    kill -9 $pid || fail "it had ended before: $(cat victim.out)"
    wait $pid
    code=$?
    [ $code = 137 ] || fail "ended with $code"
    echo "killed after $random of $((life * 3 / 2)) hundredths: ${state:-no word yet}"
    round=$((round + 1))
done
if blanket stats victim 2>said.log; then fail "it is still there"; fi
[ "$(blanket ps | awk 'NR > 1 { print $1 }')" = neighbour ] || fail "ps"
ticking neighbour
blanket kill neighbour || fail "kill: $?"
nothing_leaked "$rounds killed"
if [ "$BLANKET_HOST" = module ]; then rmmod blanket || fail "the module stays"; fi
echo "KILL-OK"
