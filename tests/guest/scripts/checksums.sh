#!/bin/sh
# Memory that must keep what is written to it: files of random bytes whose digests
# are taken again and again, on all CPUs at once, beside new files and processes.
# MIB is the size of one of the four files, ROUNDS how often each is read.
. "${0%/*}/lib.sh"
MIB=${MIB:-8}
ROUNDS=${ROUNDS:-8}

write_files() {
    for file in 1 2 3 4; do
        dd if=/dev/urandom of=/tmp/sum$file bs=1M count="$MIB" 2>/dev/null || fail "no file"
        md5sum </tmp/sum$file >/tmp/sum$file.md5 || fail "no digest"
    done
}

# A file is read, copied, and the copy is read; the copy becomes the file.
keep() {
    round=0
    while [ $round -lt "$ROUNDS" ]; do
        cp "/tmp/sum$1" "/tmp/sum$1.new" || exit 1
        [ "$(md5sum <"/tmp/sum$1.new")" = "$(cat "/tmp/sum$1.md5")" ] || exit 1
        mv "/tmp/sum$1.new" "/tmp/sum$1" || exit 1
        /bin/true || exit 1
        round=$((round + 1))
    done
}

keep_all() {
    pids=
    for file in 1 2 3 4; do
        keep $file &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || fail "file of job $pid differs"; done
}

check write_files write_files
check keep_all keep_all
rm -f /tmp/sum?*
summary
