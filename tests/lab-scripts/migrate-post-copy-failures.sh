# A VM moves before its memory does, and while that follows, the link is held (`held-link`): it is
# cut, and all goes on over the next one; the destination's process is killed, and the source says
# what that means; the source's is killed, and the destination says that the VM is lost, lets it do
# nothing more, and can be ended.
cat >script <<'S'
mount -t tmpfs -o size=40M churn /mnt
# Random bytes, which no compression makes less.
dd if=/dev/urandom of=/tmp/salt bs=1M count=8 2>/dev/null
while :; do
    for part in 0 1 2; do dd if=/tmp/salt of=/mnt/churn bs=1M seek=$((part * 8)) count=8 conv=notrunc 2>/dev/null; done
done &
S
cat tick >>script
lab-initrd script >tick.img
lives() { blanket stats "$1" >/dev/null 2>&1; }
first() { tr -d '\r' <"$1.log" | sed -n 's/^TICK //p' | head -n 1; }
at() { blanket migrate "$1" --status --json | sed -n 's/.*"stage": "\(.*\)".*/\1/p'; }
n=0
# held: $now moves to $next, and the link is held while its memory follows; $migrates moves it.
held() {
    n=$((n + 1))
    next=to-$n
    blanket run --incoming 127.0.0.1:$((7100 + n)) --token-file $next.token --name $next --memory 128M \
        --console file:$next.log --detach >/dev/null 2>err || fail "$next does not wait: $(cat err)"
    mkfifo say-$n
    held-link $((7200 + n)) $((7100 + n)) pull <say-$n >held-$n &
    between=$!
    exec 5>say-$n
    listens $((7200 + n))
    blanket migrate $now --to 127.0.0.1:$((7200 + n)) --token-file $next.token --post-copy now --patience 5 --json \
        >moved 2>err &
    migrates=$!
    until_true "its memory does not follow: $(cat err)" "grep -q HELD held-$n || ! kill -0 $migrates 2>/dev/null"
    grep -q HELD held-$n || fail "its memory was all there at once: $(cat moved err)"
    is pulling "$(at $next)" "the destination"
    is pulling "$(at $now)" "the source"
    ! blanket save $next saved 2>said || fail "it is saved"
    grep -q 'a part of its memory is still where it came from' said || fail "no word about it: $(cat said)"
}

now=vm
start vm
ticking vm
held
echo cut >&5
exec 5>&-
wait $migrates || fail "it does not go on over another link: $(cat err)"
tr -d ' \n' <moved
echo
grep -q '"stage": "moved"' moved || fail "it has not moved: $(cat moved)"
grep -q 'the link is lost' err || fail "no word about the link: $(cat err)"
until_true "$now is still there" '! lives $now'
ticking $next
is $(($(ticks $now) + 1)) "$(first $next)" "the next number"
is here "$(at $next)" "the destination"
kill $between
echo "ok: the link was cut"

now=$next
held
kill -9 "$(pid_of $next)"
echo cut >&5
exec 5>&-
wait $migrates
is 9 $? "exit code"
is cut "$(at $now)" "the source"
grep -q 'or it is lost there' err || fail "no word about it: $(cat err)"
! blanket migrate $now --keep 2>said || fail "it is kept, and ran elsewhere"
blanket kill $now || fail "the source cannot be ended"
kill $between
echo "ok: the destination was killed"

now=again
start again
ticking again
held
kill -9 "$(pid_of $now)"
echo cut >&5
exec 5>&-
wait $migrates
is 1 $? "exit code"
grep -q 'which is lost' err || fail "the destination was not told: $(cat err)"
until_true "it is not lost" '[ "$(at $next)" = lost ]'
grep -q 'memory are lost' /run/blanket/$next.log || fail "its log does not say so"
was=$(ticks $next)
sleep 2
is "$was" "$(ticks $next)" "it works on without its memory"
blanket kill $next || fail "it cannot be killed"
until_true "$next is still there" '! lives $next'
kill $between
echo "POST-COPY-FAILURES-OK"
