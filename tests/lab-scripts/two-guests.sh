# Runs in an instance: two VMs with different kernels beside each other.
cat >/tmp/script <<'X'
n=0
while [ $n -lt 200 ]; do /bin/true || exit 1; n=$((n + 1)); done
dd if=/dev/zero bs=1M count=20 2>/dev/null | md5sum
X
guest /tmp/script --kernel /guest/vmlinuz-cloud --cpus 2 --name first >/tmp/first 2>&1 &
first=$!
guest /tmp/script --kernel /guest/vmlinuz-generic --cpus 2 --name second >/tmp/second 2>&1 &
second=$!
wait $first && wait $second && exit 0
echo "== first"; cat /tmp/first
echo "== second"; cat /tmp/second
exit 1
