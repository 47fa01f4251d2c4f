# Two instances of one vendor, the other one's CPU much older: what a VM's guest has found in its
# CPU decides where it can go, before anything of it is sent.
start vm
ticking vm
other "blanket run --incoming 0.0.0.0:7100 --token-file token --name vm --memory 128M --detach"
token=$(other cat token)
for dry in --dry-run ''; do
    ! blanket migrate vm --to 10.77.0.2:7100 --token "$token" $dry 2>err || fail "it goes to a CPU without AVX"
    grep -q 'has found .*avx' err || fail "no word about AVX: $(cat err)"
done
ticking vm
echo "ok: $(sed -n '1s/^blanket: //p' err)"

# Its guest has found no XSAVE, and keeps its registers otherwise.
other "echo 'sleep 100000' >idle; lab-initrd idle >idle.img; blanket run --name back --kernel /guest/vmlinuz \
    --initrd idle.img --memory 128M --detach --cmdline quiet"
blanket run --incoming 0.0.0.0:7101 --token-file token --name back --memory 128M --detach >/dev/null || fail "nobody waits"
other "blanket migrate back --to 10.77.0.1:7101 --token $(cat token) --dry-run 2>&1" >err
grep -q XSAVE err || fail "no word about XSAVE: $(cat err)"
blanket stats vm >/dev/null || fail "it is gone"
echo "OTHER-CPU-OK"
