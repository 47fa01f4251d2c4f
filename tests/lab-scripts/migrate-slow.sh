# A VM with four vCPUs whose programs write faster than the link carries, and the link is one
# between continents: 75 ms there and back, 100 Mbit/s. It is slowed down until it can be moved, or
# with POST_COPY=auto until it would be slowed down too much, and its memory follows it. Nothing that
# it counts or computes is lost.
cat >script <<'S'
mount -t tmpfs -o size=60M churn /mnt
# Random bytes, which no compression makes less.
dd if=/dev/urandom of=/tmp/salt bs=1M count=8 2>/dev/null
for part in 0 1 2; do
    while :; do dd if=/tmp/salt of=/mnt/churn bs=1M seek=$((part * 8)) count=8 conv=notrunc 2>/dev/null; done &
done
S
cat tick >>script
lab-initrd script >tick.img
start near --cpus 4
ticking near
blanket run --incoming 127.0.0.1:7100 --token-file token --name far --memory 128M --cpus 4 --console file:far.log \
    --detach >/dev/null || fail "nobody waits"
held-link 7200 7100 slow 37 12500000 &
listens 7200
between=$!
blanket migrate near --to 127.0.0.1:7200 --token-file token --max-downtime 1000 --post-copy $POST_COPY --json >moved 2>err ||
    fail "it does not move: $(cat err)"
tr -d ' \n' <moved
echo
figure() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" moved; }
[ "$(figure rounds)" -lt 30 ] || fail "its rounds did not become small enough"
[ "$(figure share)" -lt 100 ] || fail "it was not slowed down: this tries nothing"
if [ $POST_COPY = auto ]; then
    [ "$(figure share)" -ge 25 ] || fail "it was slowed down too much"
    [ "$(figure pull_ms)" -gt 0 ] || fail "nothing followed it: this tries nothing"
    [ "$(figure downtime_ms)" -lt 1000 ] || fail "it stood still as if all had to come first"
fi
until_true "it is still here" '! blanket stats near >/dev/null 2>&1'
ticking far
first=$(tr -d '\r' <far.log | sed -n 's/^TICK //p' | head -n 1)
is $(($(ticks near) + 1)) "$first" "the next number"
blanket kill far
kill $between
echo "SLOW-OK"
