# Runs in an instance: two like VMs whose memory its KSM merges and unmerges while they
# take digests of what they hold. Nothing may be wrong; the gain is printed.
ksm=/sys/kernel/mm/ksm
echo 100000 >$ksm/pages_to_scan
echo 10 >$ksm/sleep_millisecs
echo 1 >$ksm/run
echo "MIB=4 ROUNDS=6 sh /tests/checksums.sh" >/tmp/script
guest /tmp/script --mergeable --cpus 2 --name one --stats-on-exit >/tmp/one 2>&1 &
one=$!
guest /tmp/script --mergeable --cpus 1 --name two --stats-on-exit >/tmp/two 2>&1 &
two=$!
most=0
while kill -0 $one 2>/dev/null || kill -0 $two 2>/dev/null; do
    now=$(cat $ksm/pages_sharing)
    [ "$now" -le $most ] || most=$now
    sleep 1
done
wait $one
one=$?
wait $two
two=$?
cat /tmp/one /tmp/two
echo "$((most / 256)) MiB saved by merging at most"
[ $one = 0 ] && [ $two = 0 ] && [ $most -gt 2000 ]
