//! What of the Xen PV ABI is there, as data: the table in `docs/guest-abi.md` is
//! printed from it, and a test compares it with what the dispatcher answers.

use blanket_abi::xen::hypercall as nr;

/// How much of a call is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As in Xen, for a guest without devices of its own.
    Full,
    /// The part that Linux uses; `why` says what is missing.
    Partial,
    /// Answered with the errno that makes Linux do without.
    Refused,
}

/// One call, or one command of a call.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Hypercall number.
    pub call: u64,
    /// Command, for calls that have some.
    pub sub: Option<u64>,
    /// Name of the command.
    pub name: &'static str,
    /// How much is there.
    pub status: Status,
    /// What is missing, or why it is refused.
    pub why: &'static str,
    /// The test that shows it.
    pub test: &'static str,
}

const fn row(
    call: u64,
    sub: Option<u64>,
    name: &'static str,
    status: Status,
    why: &'static str,
    test: &'static str,
) -> Row {
    Row { call, sub, name, status, why, test }
}

use Status::{Full, Partial, Refused};

/// Booting a stock kernel.
const BOOT: &str = "lab: boot";
/// The ABI program in guest and instance.
const ABI: &str = "lab: abi-test";
/// The test that asks the dispatcher for everything.
const TABLE: &str = "core: coverage";

/// The whole ABI.
pub const TABLE_ROWS: &[Row] = &[
    row(nr::SET_TRAP_TABLE, None, "", Full, "", BOOT),
    row(nr::MMU_UPDATE, None, "", Partial, "no foreign domains", BOOT),
    row(nr::SET_GDT, None, "", Full, "", BOOT),
    row(nr::STACK_SWITCH, None, "", Full, "", BOOT),
    row(nr::SET_CALLBACKS, None, "", Full, "", BOOT),
    row(nr::FPU_TASKSWITCH, None, "", Partial, "TS is never set: FPU state is always loaded", BOOT),
    row(nr::PLATFORM_OP, None, "", Refused, "control domain only", TABLE),
    row(nr::SET_DEBUGREG, None, "", Full, "", ABI),
    row(nr::GET_DEBUGREG, None, "", Full, "", ABI),
    row(nr::UPDATE_DESCRIPTOR, None, "", Full, "", ABI),
    row(nr::MEMORY_OP, Some(nr::memory::INCREASE_RESERVATION), "increase_reservation", Refused, "balloon uses populate_physmap", TABLE),
    row(nr::MEMORY_OP, Some(nr::memory::DECREASE_RESERVATION), "decrease_reservation", Partial, "the frames stay the guest's", BOOT),
    row(nr::MEMORY_OP, Some(nr::memory::MAXIMUM_RAM_PAGE), "maximum_ram_page", Full, "", TABLE),
    row(nr::MEMORY_OP, Some(nr::memory::CURRENT_RESERVATION), "current_reservation", Full, "", TABLE),
    row(nr::MEMORY_OP, Some(nr::memory::MAXIMUM_RESERVATION), "maximum_reservation", Full, "", TABLE),
    row(nr::MEMORY_OP, Some(nr::memory::POPULATE_PHYSMAP), "populate_physmap", Partial, "order 0, the frames named", BOOT),
    row(nr::MEMORY_OP, Some(nr::memory::MEMORY_MAP), "memory_map", Full, "", BOOT),
    row(nr::MEMORY_OP, Some(nr::memory::EXCHANGE), "exchange", Refused, "memory is contiguous already", TABLE),
    row(nr::MEMORY_OP, Some(nr::memory::MACHPHYS_MAPPING), "machphys_mapping", Full, "", BOOT),
    row(nr::MULTICALL, None, "", Full, "", BOOT),
    row(nr::UPDATE_VA_MAPPING, None, "", Full, "", BOOT),
    row(nr::SET_TIMER_OP, None, "", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::VERSION), "version", Full, "", BOOT),
    row(nr::XEN_VERSION, Some(nr::version::EXTRAVERSION), "extraversion", Full, "", BOOT),
    row(nr::XEN_VERSION, Some(nr::version::COMPILE_INFO), "compile_info", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::CAPABILITIES), "capabilities", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::CHANGESET), "changeset", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::PLATFORM_PARAMETERS), "platform_parameters", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::GET_FEATURES), "get_features", Full, "", BOOT),
    row(nr::XEN_VERSION, Some(nr::version::PAGESIZE), "pagesize", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::GUEST_HANDLE), "guest_handle", Partial, "always zero", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::COMMANDLINE), "commandline", Full, "", TABLE),
    row(nr::XEN_VERSION, Some(nr::version::BUILD_ID), "build_id", Refused, "optional", TABLE),
    row(nr::CONSOLE_IO, Some(0), "write", Full, "", BOOT),
    row(nr::CONSOLE_IO, Some(1), "read", Partial, "no input", TABLE),
    row(nr::GRANT_TABLE_OP, Some(0), "map", Refused, "a guest maps no grants", TABLE),
    row(nr::GRANT_TABLE_OP, Some(1), "unmap", Refused, "a guest maps no grants", TABLE),
    row(nr::GRANT_TABLE_OP, Some(2), "setup_table", Full, "", BOOT),
    row(nr::GRANT_TABLE_OP, Some(3), "dump_table", Refused, "control domain only", TABLE),
    row(nr::GRANT_TABLE_OP, Some(4), "transfer", Refused, "obsolete", TABLE),
    row(nr::GRANT_TABLE_OP, Some(5), "copy", Refused, "backends only", TABLE),
    row(nr::GRANT_TABLE_OP, Some(6), "query_size", Full, "", BOOT),
    row(nr::GRANT_TABLE_OP, Some(7), "unmap_and_replace", Refused, "a guest maps no grants", TABLE),
    row(nr::GRANT_TABLE_OP, Some(8), "set_version", Partial, "version 1", BOOT),
    row(nr::GRANT_TABLE_OP, Some(9), "get_status_frames", Refused, "version 1", TABLE),
    row(nr::GRANT_TABLE_OP, Some(10), "get_version", Full, "", TABLE),
    row(nr::GRANT_TABLE_OP, Some(11), "swap_grant_ref", Refused, "no user of it", TABLE),
    row(nr::GRANT_TABLE_OP, Some(12), "cache_flush", Refused, "Arm only", TABLE),
    row(nr::VM_ASSIST, None, "", Partial, "no architectural IOPL", BOOT),
    row(nr::UPDATE_VA_MAPPING_OTHERDOMAIN, None, "", Refused, "no foreign domains", TABLE),
    row(nr::IRET, None, "", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::INITIALISE), "initialise", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::UP), "up", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::DOWN), "down", Full, "", ABI),
    row(nr::VCPU_OP, Some(nr::vcpu::IS_UP), "is_up", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::GET_RUNSTATE_INFO), "get_runstate_info", Partial, "own vCPU", TABLE),
    row(nr::VCPU_OP, Some(nr::vcpu::REGISTER_RUNSTATE_MEMORY_AREA), "register_runstate", Partial, "own vCPU", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::SET_PERIODIC_TIMER), "set_periodic_timer", Full, "", TABLE),
    row(nr::VCPU_OP, Some(nr::vcpu::STOP_PERIODIC_TIMER), "stop_periodic_timer", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::SET_SINGLESHOT_TIMER), "set_singleshot_timer", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::STOP_SINGLESHOT_TIMER), "stop_singleshot_timer", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::REGISTER_VCPU_INFO), "register_vcpu_info", Full, "", BOOT),
    row(nr::VCPU_OP, Some(nr::vcpu::SEND_NMI), "send_nmi", Full, "", TABLE),
    row(nr::VCPU_OP, Some(nr::vcpu::GET_PHYSID), "get_physid", Refused, "pinned vCPUs only", TABLE),
    row(nr::VCPU_OP, Some(nr::vcpu::REGISTER_VCPU_TIME_MEMORY_AREA), "register_time_area", Partial, "own vCPU", BOOT),
    row(nr::SET_SEGMENT_BASE, None, "", Full, "", BOOT),
    row(nr::MMUEXT_OP, None, "", Partial, "no superpages, no foreign domains", BOOT),
    row(nr::XSM_OP, None, "", Refused, "security modules", TABLE),
    row(nr::NMI_OP, None, "", Refused, "callback_op has it", TABLE),
    row(nr::SCHED_OP, Some(nr::sched::YIELD), "yield", Full, "", BOOT),
    row(nr::SCHED_OP, Some(nr::sched::BLOCK), "block", Full, "", BOOT),
    row(nr::SCHED_OP, Some(nr::sched::SHUTDOWN), "shutdown", Full, "", BOOT),
    row(nr::SCHED_OP, Some(nr::sched::POLL), "poll", Full, "", BOOT),
    row(nr::SCHED_OP, Some(nr::sched::REMOTE_SHUTDOWN), "remote_shutdown", Refused, "control domain only", TABLE),
    row(nr::SCHED_OP, Some(nr::sched::SHUTDOWN_CODE), "shutdown_code", Full, "", TABLE),
    row(nr::SCHED_OP, Some(nr::sched::WATCHDOG), "watchdog", Refused, "not yet", TABLE),
    row(nr::SCHED_OP, Some(nr::sched::PIN_OVERRIDE), "pin_override", Refused, "control domain only", TABLE),
    row(nr::CALLBACK_OP, Some(nr::callback::REGISTER), "register", Full, "", BOOT),
    row(nr::CALLBACK_OP, Some(nr::callback::UNREGISTER), "unregister", Full, "", TABLE),
    row(nr::XENOPROF_OP, None, "", Refused, "profiling", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(0), "bind_interdomain", Full, "", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(1), "bind_virq", Full, "", BOOT),
    row(nr::EVENT_CHANNEL_OP, Some(2), "bind_pirq", Refused, "no physical interrupts", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(3), "close", Full, "", ABI),
    row(nr::EVENT_CHANNEL_OP, Some(4), "send", Full, "", BOOT),
    row(nr::EVENT_CHANNEL_OP, Some(5), "status", Full, "", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(6), "alloc_unbound", Full, "", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(7), "bind_ipi", Full, "", BOOT),
    row(nr::EVENT_CHANNEL_OP, Some(8), "bind_vcpu", Full, "", BOOT),
    row(nr::EVENT_CHANNEL_OP, Some(9), "unmask", Full, "", BOOT),
    row(nr::EVENT_CHANNEL_OP, Some(10), "reset", Full, "", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(11), "init_control", Refused, "2-level ABI only", BOOT),
    row(nr::EVENT_CHANNEL_OP, Some(12), "expand_array", Refused, "2-level ABI only", TABLE),
    row(nr::EVENT_CHANNEL_OP, Some(13), "set_priority", Refused, "2-level ABI only", TABLE),
    row(nr::PHYSDEV_OP, Some(6), "set_iopl", Full, "", BOOT),
    row(nr::PHYSDEV_OP, Some(7), "set_iobitmap", Full, "", TABLE),
    row(nr::PHYSDEV_OP, Some(28), "pirq_eoi_gmfn_v2", Refused, "no physical interrupts", BOOT),
    row(nr::HVM_OP, None, "", Refused, "HVM guests", TABLE),
    row(nr::SYSCTL, None, "", Refused, "control domain only", TABLE),
    row(nr::DOMCTL, None, "", Refused, "control domain only", TABLE),
    row(nr::KEXEC_OP, None, "", Refused, "control domain only", TABLE),
    row(nr::TMEM_OP, None, "", Refused, "obsolete", TABLE),
    row(nr::ARGO_OP, None, "", Refused, "no Argo", TABLE),
    row(nr::XENPMU_OP, None, "", Refused, "no performance counters", BOOT),
    row(nr::DM_OP, None, "", Refused, "device models", TABLE),
];
