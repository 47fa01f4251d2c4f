# Runs in an instance, or on any machine that has the module loaded or a KVM that
# works: two stock kernels as VMs beside each other, a workload in both and natively,
# figures.
#   KERNELS  "NAME=FILE NAME=FILE", the kernels of the VMs
#   MKINITRD command that prints a VM's initramfs with a script in it
set -e
dir=$(mktemp -d)
cr=$(printf '\r')
now() { read -r up _ </proc/uptime; echo "$up"; }
since() { echo "$(now) $1" | awk '{ printf "%.2f", $1 - $2 }'; }
say() { echo "  [$(now) s] $*"; }

cat >$dir/work <<'X'
# 150 processes, two checksums at once, ten thousand lines through a pipe.
read -r start _ </proc/uptime
n=0
while [ $n -lt 150 ]; do /bin/busybox true; n=$((n + 1)); done
dd if=/dev/zero bs=1M count=12 2>/dev/null | md5sum >/dev/null &
dd if=/dev/zero bs=1M count=12 2>/dev/null | sha1sum >/dev/null &
wait
seq 1 10000 | sort -n | tail -n 1 >/dev/null
read -r end _ </proc/uptime
echo "WORK $(echo "$end $start" | awk '{ printf "%.2f", $1 - $2 }')"
X
cat >$dir/script <<X
$(cat $dir/work)
read -r _ </dev/console
X

if grep -qwE 'vmx|svm' /proc/cpuinfo; then
    say "this machine has virtualization: VMs run inside KVM, without a module of ours"
else
    say "no VMX, no SVM: no nested virtualization here"
fi
module=$(cut -d' ' -f1 /proc/modules | grep -x blanket || true)
say "$(uname -r), $(grep -c ^processor /proc/cpuinfo) CPUs${module:+, module $module}"
blanket doctor

# As often beside each other as there will be VMs.
for pair in $KERNELS; do sh $dir/work >$dir/native & done
wait
native=$(sed 's/WORK //' $dir/native)
say "workload without a VM, twice at once: $native s"

$MKINITRD $dir/script >$dir/initrd
mkfifo $dir/events
exec 4<>$dir/events
count=0
for pair in $KERNELS; do
    name=${pair%%=*}
    mkfifo $dir/$name.in $dir/$name.pipe
    now >$dir/$name.start
    (
        code=0
        blanket run --name $name --kernel "${pair#*=}" --initrd $dir/initrd --memory 256M \
            --cpus 2 --cmdline "console=hvc0 quiet panic=-1" <>$dir/$name.in >$dir/$name.pipe 2>&1 || code=$?
        echo "$name ended $code" >&4
    ) &
    (
        # No filter in between: one that collects its output would hold back lines.
        while read -r line; do
            line=${line%"$cr"}
            echo "$line" >>$dir/$name.log
            case $line in
            GUEST-READY*) echo "$name ready $line" >&4 ;;
            WORK*) echo "$name work ${line#WORK }" >&4 ;;
            esac
        done <$dir/$name.pipe
    ) &
    count=$((count + 1))
done

worked=0
ended=0
status=0
while [ $ended -lt $count ]; do
    read -r name event rest <&4
    case $event in
    ready) say "$name: stock kernel ${rest#GUEST-READY } at its init after $(since $(cat $dir/$name.start)) s" ;;
    work)
        say "$name: workload $rest s, $(echo "$rest $native" | awk '{ printf "%.1f", $1 / ($2 > 0 ? $2 : 0.01) }') times that without a VM"
        worked=$((worked + 1))
        if [ $worked = $count ]; then
            say "both VMs are up:"
            blanket ps
            for pair in $KERNELS; do
                echo "${pair%%=*}:"
                blanket stats ${pair%%=*} |
                    sed -e '/^hypercalls:/,/^kvm:/{/^kvm:/!d}' -e '/ 0$/d' -e 's/^/    /'
                echo >$dir/${pair%%=*}.in
            done
        fi
        ;;
    ended)
        say "$name: ended with $rest"
        ended=$((ended + 1))
        [ "$rest" = 0 ] || { status=1; cat $dir/$name.log; }
        ;;
    esac
done
[ $worked = $count ] || status=1
rm -r $dir
exit $status
