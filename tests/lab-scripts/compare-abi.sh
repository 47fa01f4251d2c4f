# Runs in an instance: abi-test prints the same results there and in a VM.
abi-test --scale 0.2 >/tmp/instance.txt 2>&1
cat >/tmp/script <<'X'
abi-test --scale 0.2
true
X
guest /tmp/script --cpus 2 >/tmp/guest.txt 2>&1 || { cat /tmp/guest.txt; exit 1; }
results() { tr -d '\r' <"$1" | grep -E '^(PASS|FAIL|INFO) ' | sed 's/:.*//' | sort; }
results /tmp/instance.txt >/tmp/a
results /tmp/guest.txt >/tmp/b
grep -q PASS /tmp/a || { cat /tmp/instance.txt; exit 1; }
if ! diff /tmp/a /tmp/b; then
    echo "The instance:"; grep FAIL /tmp/instance.txt
    echo "The VM:"; cat /tmp/guest.txt
    exit 1
fi
