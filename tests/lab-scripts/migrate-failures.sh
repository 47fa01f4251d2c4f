# A VM moves, and at one step of the handover after the other (`held-link` holds the link
# there) the link is cut, or one of the two processes is killed. Afterwards one of them runs
# it, or can; what it counts goes on where it was; and the user was told which. WALK has the
# steps and what happens there.
now=
n=0

lives() { blanket stats "$1" >/dev/null 2>&1; }
first() { tr -d '\r' <"$1.log" | sed -n 's/^TICK //p' | head -n 1; }
# image NAME [DIRECTORY]: a disk of its own.
image() { blanket disk create --format raw --size 4M "${2:-.}/$1.raw" >/dev/null || fail "no image for $1"; }
# waits NAME PORT DIRECTORY: a process that the VM can move to.
waits() {
    image $1 $3
    blanket run --incoming 127.0.0.1:$2 --token-file $1.token --name $1 --memory 128M --disk $3/$1.raw \
        --console file:$1.log --detach >/dev/null 2>err || fail "$1 does not wait: $(cat err)"
}
# The VM goes on at its source, or in `next`, with the number after the last one.
stays() {
    until_true "$1: $next is still there" '! lives $next'
    ticking $now
    tr -d '\r' <$now.log | sed -n 's/^TICK //p' |
        awk 'NR > 1 && $1 != last + 1 { exit 1 } { last = $1 }' || fail "$1: $now counts otherwise"
    echo "ok: $1: it stays, exit code $code"
}
moves() {
    until_true "$1: $now is still there" '! lives $now'
    ticking $next
    is $(($(ticks $now) + 1)) "$(first $next)" "$1: the next number"
    echo "ok: $1: it has moved, exit code $code"
    now=$next
}

walk() {
    step=${1%:*}
    n=$((n + 1))
    if [ -z "$now" ]; then
        now=vm-$n
        image $now
        dd if=/dev/urandom of=$now.raw bs=1M count=4 conv=notrunc 2>/dev/null
        start $now --disk $now.raw
        ticking $now
    fi
    next=to-$n
    waits $next $((7100 + n)) .
    mkfifo say-$n
    held-link $((7200 + n)) $((7100 + n)) $step <say-$n >held-$n &
    between=$!
    exec 5>say-$n
    listens $((7200 + n))
    blanket migrate $now --to 127.0.0.1:$((7200 + n)) --token-file $next.token --patience 5 --json >moved 2>err &
    migrates=$!
    until_true "$1: its step is not reached: $(cat err)" "grep -q HELD held-$n || ! kill -0 $migrates 2>/dev/null"
    grep -q HELD held-$n || fail "$1: its step is not reached: $(cat err)"
    case $1 in
    *:source) kill -9 "$(pid_of $now)" ;;
    *:destination) kill -9 "$(pid_of $next)" ;;
    esac
    echo cut >&5
    exec 5>&-
    wait $migrates
    code=$?
    case $1 in
    copy:source)
        # It was nowhere else.
        [ $code -ne 0 ] || fail "$1: exit code 0"
        until_true "$1: $next waits on" '! lives $next'
        echo "ok: $1: it is gone, exit code $code"
        now=
        ;;
    copy:* | ready:cut | ready:destination)
        is 1 $code "$1: exit code"
        stays $1
        ;;
    go:destination | runs:destination)
        is 9 $code "$1: exit code"
        grep -q -- --keep err || fail "$1: no word about --keep: $(cat err)"
        # Another destination does not know.
        waits other-$n $((7300 + n)) .
        ! blanket migrate $now --to 127.0.0.1:$((7300 + n)) --token-file other-$n.token 2>err || fail "$1: it went elsewhere"
        grep -q 'another destination' err || fail "$1: no word about it: $(cat err)"
        blanket kill other-$n || fail "$1: other-$n has ended"
        blanket migrate $now --keep >/dev/null || fail "$1: it is not kept"
        stays $1
        ;;
    ready:source | go:source)
        [ $code -ne 0 ] || fail "$1: exit code 0"
        is '' "$(first $next)" "$1: nobody gave it, and it runs"
        until_true "$1: it cannot be claimed: $(cat err)" "blanket migrate $next --keep >/dev/null 2>err"
        moves $1
        ;;
    runs:source)
        [ $code -ne 0 ] || fail "$1: exit code 0"
        moves $1
        ;;
    *:cut)
        is 0 $code "$1: exit code ($(cat err))"
        grep -q '"stage": "moved"' moved || fail "$1: it has not moved: $(cat moved)"
        moves $1
        ;;
    esac
    kill $between
}

for pair in $WALK; do walk $pair; done

# A destination whose file system is full, while disks come.
next=full
mkdir small
mount -t tmpfs -o size=1M tmpfs small
waits full 7099 small
blanket migrate $now --to 127.0.0.1:7099 --token-file full.token 2>err
code=$?
is 1 $code "a full file system: exit code"
stays "a full file system"
blanket kill $now
echo "WALK-OK"
