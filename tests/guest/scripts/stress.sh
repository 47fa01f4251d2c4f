#!/bin/sh
# Processes, pipes, files and checksums under load, with results known
# beforehand. For a VM or an instance; needs busybox, /proc, /sys and a tmpfs
# on /tmp, and 64 MiB of free memory.
. "${0%/*}/lib.sh"

# Digests of 8 MiB of zeros, of `seq 1 200000`, and of the first 4,000,000
# bytes of `yes blanket`.
ZEROS=2daeb1f36095b44b318410b3f4e8b5d989dcc7bb023d1426c492dab0a3053e74
SEQ=5af7b95208fdcff454bab3f5eddf567a688a3796c703d4fef91072e38645c062
YES=6707aa0b23021c41144da1d6f3ec2945475a586b7246d0998007e6e382802dfaeaaecfa3b4361863b64870215dc3af4fad92521b2375a0ed0d279c84b24fedf1

zeros() { dd if=/dev/zero bs=64k count=128 2>/dev/null; }
numbers() { seq 1 200000; }

fork_storm() {
    i=0
    limit=$(count 2000)
    while [ $i -lt "$limit" ]; do
        /bin/true || fail "run $i"
        i=$((i + 1))
    done
}

# Subshells: fork without exec.
subshell_storm() {
    i=0
    limit=$(count 2000)
    while [ $i -lt "$limit" ]; do
        [ "$(echo $i)" = $i ] || fail "subshell $i"
        i=$((i + 1))
    done
}

fork_storm_parallel() {
    limit=$(count 300)
    pids=
    for job in 1 2 3 4; do
        (
            i=0
            while [ $i -lt "$limit" ]; do
                /bin/true || exit 1
                i=$((i + 1))
            done
        ) &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || fail "job $pid"; done
}

# Everything at once, on every CPU.
pipes_parallel() {
    pids=
    round=$(count 4)
    while [ "$round" -gt 0 ]; do
        (digest $ZEROS zeros) & pids="$pids $!"
        (digest $SEQ numbers) & pids="$pids $!"
        (
            got=$(yes blanket | head -c 4000000 | sha512sum)
            [ "${got%% *}" = $YES ] || fail "$got"
        ) & pids="$pids $!"
        (
            got=$(zeros | md5sum)
            [ "${got%% *}" = 96995b58d4cbf6aaa9041b4f00c7f6ae ] || fail "$got"
        ) & pids="$pids $!"
        round=$((round - 1))
    done
    for pid in $pids; do wait "$pid" || fail "pipe $pid"; done
}

pipe_chain() {
    digest $SEQ sh -c 'seq 1 200000 | cat | cat | cat | cat | cat | cat | cat | cat'
    [ "$(numbers | sort -rn | sort -n | tail -n 1)" = 200000 ] || fail sort
    [ "$(numbers | awk '{ s += $1 } END { printf "%.0f", s }')" = 20000100000 ] || fail awk
}

compress() {
    digest $SEQ sh -c 'seq 1 200000 | gzip -9 | gunzip'
    digest $SEQ sh -c 'seq 1 200000 | bzip2 -1 | bunzip2'
}

archive() {
    mkdir tree
    for i in $(seq 1 "$(count 200)"); do
        mkdir -p tree/$((i % 17))
        seq 1 $i >tree/$((i % 17))/$i
    done
    before=$(find tree -type f | sort | xargs sha256sum | sha256sum)
    tar czf tree.tgz tree
    mv tree old
    tar xzf tree.tgz
    after=$(find tree -type f | sort | xargs sha256sum | sha256sum)
    [ "$before" = "$after" ] || fail "$before / $after"
    rm -rf tree old tree.tgz
}

# Random data copied about, with the page cache dropped in between.
copies() {
    dd if=/dev/urandom of=data bs=64k count=128 2>/dev/null
    sum=$(sha256sum <data)
    for round in $(seq 1 "$(count 3)"); do
        pids=
        for copy in 1 2 3 4; do cp data data$copy & pids="$pids $!"; done
        for pid in $pids; do wait "$pid" || fail cp; done
        echo 3 >/proc/sys/vm/drop_caches
        for copy in 1 2 3 4; do
            [ "$(sha256sum <data$copy)" = "$sum" ] || fail "copy $copy in round $round"
            rm data$copy
        done
    done
    rm data
}

mounts() {
    mkdir m
    for i in $(seq 1 "$(count 30)"); do
        mount -t tmpfs -o size=4m stress m || fail "mount $i"
        seq 1 1000 >m/file
        [ "$(tail -n 1 m/file)" = 1000 ] || fail "file $i"
        dd if=/dev/zero of=m/big bs=64k count=100 2>/dev/null && fail "more than 4 MiB in 4 MiB"
        umount m || fail "umount $i"
    done
    rmdir m
}

namespaces() {
    for i in $(seq 1 "$(count 20)"); do
        got=$(unshare -m -p -f -u -i -n sh -c "hostname guest$i; hostname; echo \$\$")
        [ "$got" = "guest$i
1" ] || fail "namespace $i: $got"
    done
}

signals() {
    for i in $(seq 1 "$(count 50)"); do
        (trap 'exit 42' TERM; while :; do sleep 0.01; done) &
        pid=$!
        # The trap is set when the child has started its first sleep.
        until [ -n "$(cat /proc/$pid/task/$pid/children 2>/dev/null)" ]; do :; done
        kill -TERM $pid
        wait $pid
        [ $? = 42 ] || fail "round $i"
    done
}

# More memory than the caches hold, on all CPUs, several times.
memory_churn() {
    pids=
    for job in $(seq 1 4); do
        (
            for round in $(seq 1 "$(count 5)"); do
                digest $ZEROS dd if=/dev/zero bs=8M count=1
            done
        ) &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || fail "job $pid"; done
}

sleeps() {
    read -r before _ </proc/uptime
    for i in $(seq 1 20); do sleep 0.3 & done
    wait
    read -r after _ </proc/uptime
    slept=$(echo "$after $before" | awk '{ printf "%d", ($1 - $2) * 100 }')
    [ "$slept" -ge 29 ] || fail "20 sleeps of 300 ms at once took ${slept}0 ms"
}

check fork_storm fork_storm
check subshell_storm subshell_storm
check fork_storm_parallel fork_storm_parallel
check pipes_parallel pipes_parallel
check pipe_chain pipe_chain
check compress compress
check archive archive
check copies copies
check mounts mounts
check namespaces namespaces
check signals signals
check memory_churn memory_churn
check sleeps sleeps
summary
