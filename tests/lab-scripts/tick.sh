n=0
while :; do
    sum=$(dd if=/dev/zero bs=64k count=16 2>/dev/null | md5sum)
    [ "${sum%% *}" = b6d81b360a5672d80c27430f39153e2c ] || { echo BAD; exit 1; }
    n=$((n + 1))
    echo "TICK $n"
done
