# VMs that are given less than their host's CPU, by the module and inside KVM: what their kernels and programs
# find, where that is refused, and that they go to an instance without AVX, and find no more when they are back.
cat >script <<'S'
grep -m1 ^flags /proc/cpuinfo
n=0
while :; do
    n=$((n + 1))
    [ $((n % 5)) != 1 ] || abi-test cpu
    echo "TICK $n"
    sleep 0.2
done
S
lab-initrd script >tick.img
put tick.img

# found NAME: what its programs have found last; flag NAME FLAG: whether its kernel tells of it.
found() { tr -d '\r' <"$1.log" | sed -n 's/^CPU //p' | tail -n 1; }
flag() { tr -d '\r' <"$1.log" | grep ^flags | head -n 1 | grep -qw "$2"; }
# finds NAME WORD...: waits until its programs have looked anew, and found all these.
finds() {
    vm=$1
    shift
    before=$(grep -c ^CPU $vm.log)
    until_true "$vm runs no program" '[ $(grep -c ^CPU $vm.log) -gt $before ]'
    for word; do
        case " $(found $vm) " in *" $word "*) ;; *) fail "$vm has not found $word: $(found $vm)" ;; esac
    done
    echo "ok: $vm: $(found $vm)"
}
# refused WORDS OPTIONS: such a VM is not started, in these words.
refused() {
    words=$1
    shift
    ! blanket run --name no --kernel /guest/vmlinuz --memory 128M --console none "$@" </dev/null 2>err ||
        fail "it runs with $*"
    grep -q "$words" err || fail "no word of it: $(cat err)"
    echo "ok: $*: $(sed -n '1s/^[a-z]*: //p' err)"
}

# Programs' CPUID is the hardware's under the module: 1. What is not enabled is #UD: 4.
refused 'bmi1 cannot be taken away here' --cpu host,-bmi1
refused 'take avx away too' --cpu host,-avx2
refused 'more cannot be taken away here' --cpu x86-64-v2
refused 'which the CPU of this host has not' --cpu x86-64-v4
refused 'is no feature' --cpu host,-mpx

start whole
start vm --cpu host,-avx
start bare --cpu host,-xsave
finds whole avx=1:ok xgetbv=1:ok xcr0=0x7
finds vm avx=1:4 avx2=1:4 fma=1:4 bmi1=1:ok xsave=1:ok xcr0=0x3
finds bare avx=1:4 xsave=1:4 xgetbv=0:4 bmi1=1:ok
flag whole avx2 || fail "no AVX2 to take away"
for gone in avx avx2 fma f16c; do ! flag vm $gone || fail "its kernel tells of $gone"; done
flag vm xsave || fail "XSAVE is gone with AVX"
! flag bare xsave || fail "its kernel tells of XSAVE"
# It is written down without XSAVE, and goes on where there is one.
blanket save bare bare.file >/dev/null || fail "it is not saved"
blanket run --host kvm --restore bare.file --console file:bare.log --detach >/dev/null || fail "it does not go on"
finds bare avx=0:4 xsave=0:4 xgetbv=0:4
blanket kill bare

# going NAME: a place for it there. there NAME [OPTION], here NAME HOST: it moves.
going() {
    # What has left there may not have ended yet.
    other "while blanket ps | grep -q '^$1 '; do sleep 0.2; done; rm -f token; blanket run --incoming 0.0.0.0:7100 --token-file token --name $1 --memory 128M --console file:$1.log --detach 2>&1"
    token=$(other cat token)
}
there() { blanket migrate $1 --to 10.77.0.2:7100 --token "$token" --quiet ${2-}; }
here() {
    until_true "$1 has not ended" "! blanket ps | grep -q '^$1 '"
    rm -f token
    blanket run --host $2 --incoming 10.77.0.1:7101 --token-file token --name $1 --memory 128M --console file:$1.log --detach >/dev/null ||
        fail "nobody waits"
    other "blanket migrate $1 --to 10.77.0.1:7101 --token $(cat token) --quiet >moved 2>&1; echo \$? >>moved; cat moved" >moved
    [ "$(tail -n 1 moved)" = 0 ] || fail "$1 does not come back: $(cat moved)"
}

# The one that has AVX does not go to where it is not; the other one does, and comes back: here is more.
going vm
! there whole --dry-run 2>err || fail "it goes to a CPU without AVX"
grep -q 'has found .*avx' err || fail "no word about AVX: $(cat err)"
blanket kill whole
there vm --dry-run || fail "it does not go although it has no AVX"
there vm || fail "it does not go"
other "until grep -q ^CPU vm.log; do sleep 0.2; done; grep ^CPU vm.log" >log
grep -q 'avx=0:4 .*xcr0=0x3' log || fail "there: $(cat log)"
here vm module
finds vm avx=1:4 avx2=1:4 xcr0=0x3
going vm
there vm || fail "it does not go again"
here vm kvm
finds vm avx=0:4 avx2=0:4 fma=0:4 bmi1=1:ok xsave=1:ok xcr0=0x3
# In its file too.
blanket save vm vm.file >/dev/null || fail "it is not saved"
! blanket run --restore vm.file --cpu host 2>err || fail "it has another CPU"
grep -q "cannot be used with" err || fail "$(cat err)"
blanket run --host module --restore vm.file --console file:vm.log --detach >/dev/null || fail "it does not go on"
finds vm avx=1:4 xcr0=0x3
blanket kill vm

# Inside KVM whatever is taken away is gone, and does not go where it would be found.
start kvm --host kvm --cpu host,-avx,-bmi1
finds kvm avx=0:4 bmi1=0:ok xsave=1:ok xcr0=0x3
! flag kvm bmi1 || fail "its kernel tells of BMI1"
going kvm
! there kvm --dry-run 2>err || fail "it goes to where programs find BMI1"
grep -q 'without bmi1, and its programs would find that here' err || fail "no word about BMI1: $(cat err)"
echo "ok: $(sed -n '1s/^blanket: //p' err)"
other "blanket kill kvm"
finds kvm avx=0:4 bmi1=0:ok
blanket kill kvm
start none --host kvm --cpu x86-64-v2
finds none avx=0:4 bmi1=0:ok xsave=0:4 xgetbv=0:4
flag none ssse3 || fail "no SSSE3"
! flag none aes || fail "AES is of no level"
blanket kill none

# By nodes: what both have is found out.
blanket cpu | grep -q 'avx: .*avx2' || fail "$(blanket cpu)"
blanket cpu --host kvm | grep -q 'all of it' || fail "$(blanket cpu --host kvm)"
two_nodes a b
supercloud vm run --name web --kernel /guest/vmlinuz --initrd tick.img --memory 128M --cmdline quiet --cpu-for b ||
    fail "no VM"
supercloud vm show web | grep 'host,-.*avx,-avx2' || fail "$(supercloud vm show web)"
# on NODE WORD: web is there, and its programs have found that.
on() {
    until_true "no $2 on $1: $(supercloud vm logs web | tail -n 20)" "supercloud --node $1 vm logs web | grep -q 'CPU .*$2'"
    echo "ok: $1: $(supercloud vm logs web | tr -d '\r' | grep '^CPU' | tail -n 1)"
}
on a 'avx=1:4.*xcr0=0x3'
supercloud vm migrate web --to b || fail "it does not go to b"
on b 'avx=0:4.*xcr0=0x3'
supercloud vm migrate web --to a || fail "it does not come back"
on a 'avx=1:4.*xcr0=0x3'
supercloud vm stop web --now >/dev/null && supercloud vm rm web || fail "it cannot be removed"
echo "LESSER-CPU-OK"
