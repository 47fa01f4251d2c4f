# Runs in an instance: a kernel that attacks the core, seed after seed, beside a VM
# that works. Whatever becomes of the attacker, the core must not find its own state
# wrong, the other VM must not notice, and neither must the instance.
# Most seeds leave the attacker's own image alone, so that it lives to its last step;
# the last ones do not ("deadly"), and mostly end early.
#   SEEDS  how many; DEADLY  how many of the other kind; FIRST  the first seed
#   STEPS  attacks of each of two vCPUs
#   SOAK   seconds after which no further seed is begun
seeds=${SEEDS:-5}
deadly=${DEADLY:-2}
first=${FIRST:-1}
whole=0
total=0
start neighbour
ticking neighbour

# attack SEED CMDLINE: one VM.
attack() {
    timeout ${LIMIT:-40} blanket run --on-reboot exit --kernel /bin/hostile --memory 32M --cpus 2 \
        --console file:/tmp/console --json --stats-on-exit \
        --cmdline "seed=$1 steps=${STEPS:-150} $2" >/tmp/out 2>&1 </dev/null
    code=$?
    line=$(tr -d '\r' </tmp/console | grep -a "^HOSTILE seed=.*faults=" | tail -n 1 || true)
    # By the core's own count, which also has what the attacker did not live to tell.
    calls=$(sed -n 's/.*"hypercalls":{\([^}]*\)}.*/\1/p' /tmp/out | tr ',' '\n' | awk -F: '{ n += $2 } END { print n + 0 }')
    total=$((total + calls))
    if [ -n "$line" ]; then
        whole=$((whole + 1))
        echo "$line; by the core's count $calls"
    else
        echo "seed $1 $2 ended early ($code); by the core's count $calls"
    fi
    case $code in
    # Powered off; asked for a restart; crashed; asked for what there is not; in a
    # loop of its own making until the time was over.
    0 | 3 | 4 | 8 | 143) ;;
    *)
        cat /tmp/out
        fail "seed $1 $2 ended with $code"
        ;;
    esac
    grep -aq "HOSTILE begins" /tmp/console || { cat /tmp/out; fail "seed $1 never began"; }
    blanket stats neighbour >/dev/null && ! grep -q BAD neighbour.log || fail "the neighbour noticed seed $1"
}

# seconds since the instance came up
uptime_now() { cut -d. -f1 /proc/uptime; }
begun=$(uptime_now)
enough() { [ -n "$SOAK" ] && [ $(($(uptime_now) - begun)) -ge "$SOAK" ]; }

seed=$first
while [ $seed -lt $((first + seeds)) ] && ! enough; do
    attack $seed
    seed=$((seed + 1))
done
seeds=$((seed - first))
lived=$whole
last=$((seed + deadly))
while [ $seed -lt $last ]; do
    attack $seed deadly=1
    seed=$((seed + 1))
done
ticking neighbour
echo "HOSTILE-TOTAL seeds=$seeds to-their-end=$lived deadly=$deadly hypercalls=$total" \
    "seconds=$(($(uptime_now) - begun)) neighbour-worked=$(ticks neighbour)"
blanket kill neighbour || fail "kill: $?"
# Not all: what they do to themselves is random, and two vCPUs are not repeatable.
[ $((lived * 2)) -gt $seeds ] || fail "most attackers ended early"
echo "HOSTILE-OK"
