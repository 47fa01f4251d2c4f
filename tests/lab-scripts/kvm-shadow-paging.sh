# Runs in an instance: VMs inside a KVM without nested paging. KVM then shadows the
# core's tables, and keeps translations until it is told to flush: a software TLB
# that shows each flush that the core forgets.
rmmod kvm_amd && insmod /lab/modules.d/kvm-amd.ko npt=0 || exit 1
blanket doctor | grep -A 1 ^warn.*kvm
blanket doctor | grep -q "without nested paging" || { echo "FAILED: doctor does not tell"; exit 1; }
blanket run --kernel /guest/vmlinuz 2>&1 | grep -q "without nested paging" ||
    { echo "FAILED: blanket run does not tell"; exit 1; }
export BLANKET_KVM_ANY_PAGING=1
cat >/tmp/script <<'S'
N=3 sh /tests/stress.sh
S
guest /tmp/script --cpus 2 --stats-on-exit
