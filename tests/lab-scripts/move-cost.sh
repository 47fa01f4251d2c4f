# A VM that computes moves from one process to another, MOVES times, each by itself: what each
# move cost, as `blanket migrate` says it.
uptime() { read -r up _ </proc/uptime; echo $up; }
# pace WHO COUNT BEGUN: it has worked so often since then.
pace() { echo "PACE $1 $2 $(uptime) $3" | awk '{ printf "%s %s %.3f\n", $1, $2, $3 / ($4 - $5) }'; }
start vm-0
ticking vm-0 5
begun=$(uptime)
ticking vm-0 20
pace blanket 20 $begun
move=0
while [ $move -lt $MOVES ]; do
    now=vm-$move
    move=$((move + 1))
    blanket run --incoming 127.0.0.1:$((7100 + move)) --token-file token-$move --name vm-$move --memory 128M \
        --console file:vm-$move.log --detach >/dev/null || fail "nobody waits"
    blanket migrate $now --to 127.0.0.1:$((7100 + move)) --token-file token-$move --max-downtime $DOWNTIME --json >moved || fail "it does not move"
    echo "MOVE $(tr -d ' \n' <moved)"
    ticking vm-$move 5
done
blanket kill vm-$move
echo "MOVES-OK"
