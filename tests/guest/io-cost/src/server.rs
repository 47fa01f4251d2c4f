//! The instance's side: a meter of the CPU's work, and the network's other end.
//!
//! Work is what is left of the elapsed instructions when those of a program are taken away
//! that runs whenever nothing else does (`SCHED_IDLE`) and counts its turns. So the CPU is
//! never idle, time that something waits for is not counted, and interrupts are.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{Result, failed};

/// Where the server answers, by UDP and by TCP.
pub const PORT: u16 = 7100;
/// Asks how much the CPU has worked; the answer is a number of instructions.
pub const MARK: u8 = b'm';
/// As [`MARK`], once clean pages of files and devices are dropped from memory.
pub const DROP: u8 = b'd';
/// Asks for as many datagrams of the same length as the second byte says.
pub const ECHO: u8 = b'e';
/// Begins a TCP connection: the server takes so many bytes, and then says so with one.
pub const SINK: u8 = b's';
/// Begins a TCP connection: the server gives so many bytes.
pub const SOURCE: u8 = b'g';
/// Begins a TCP connection: the server sends each byte back.
pub const RETURN: u8 = b'r';
/// Bytes at the beginning of a TCP connection: what it is, and a number.
pub const HEADER: usize = 9;
/// Bytes of a write to a TCP connection.
pub const CHUNK: usize = 65536;
/// Bytes of datagrams that a socket holds.
const HOLDS: libc::c_int = 4 << 20;

/// How long the program that idles is watched alone.
const ALONE: Duration = Duration::from_millis(400);

/// What a turn may cost: two instructions, and its part of the timer's ticks.
const MOST: f64 = 3.0;

/// Counts the turns of a program that runs when nothing else does.
struct Idler {
    turns: &'static AtomicU64,
    /// Instructions for each turn, those of the timer's ticks included.
    price: f64,
}

impl Idler {
    fn start() -> Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(failed("mmap")(std::io::Error::last_os_error()));
        }
        // SAFETY: zeroed, large enough, aligned to a page, and never unmapped.
        let turns = unsafe { &*page.cast::<AtomicU64>() };
        // SAFETY: the program has one thread as yet.
        match unsafe { libc::fork() } {
            -1 => return Err(failed("fork")(std::io::Error::last_os_error())),
            0 => idle(turns),
            _ => {}
        }
        let mut this = Self { turns, price: 0.0 };
        // Once to get going, once to count.
        for _ in 0..2 {
            let (ticks, turns) = (tsc(), this.turns());
            std::thread::sleep(ALONE);
            this.price = (tsc() - ticks) as f64 / (this.turns() - turns).max(1) as f64;
        }
        if this.price > MOST {
            return Err("the machine is too busy to begin".into());
        }
        Ok(this)
    }

    fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Instructions that all but the idler has executed.
    fn work(&self) -> f64 {
        tsc() as f64 - self.turns() as f64 * self.price
    }
}

/// Counts for ever, when there is nothing better to do.
fn idle(turns: &'static AtomicU64) -> ! {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters are valid; the child shall end with its parent.
    let set = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const none)
    };
    if set != 0 {
        // SAFETY: ends the child without running anything else.
        unsafe { libc::_exit(1) }
    }
    // SAFETY: nobody else writes the word, and readers find it whole.
    unsafe {
        core::arch::asm!(
            "2: inc qword ptr [{turns}]",
            "jmp 2b",
            turns = in(reg) turns.as_ptr(),
            options(noreturn, nostack)
        )
    }
}

/// The time stamp counter.
fn tsc() -> u64 {
    // SAFETY: rdtsc is always there in 64-bit mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Room for a burst of small datagrams, whose bookkeeping is larger than they are.
pub fn make_room(socket: &UdpSocket) -> Result<()> {
    use std::os::fd::AsRawFd as _;
    let holds = HOLDS;
    // SAFETY: the value is as long as is said.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const holds).cast(),
            size_of_val(&holds) as libc::socklen_t,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(failed("SO_RCVBUFFORCE")(std::io::Error::last_os_error()))
    }
}

/// `io-cost serve`.
pub fn run() -> Result<()> {
    let idler = Idler::start()?;
    // From now on without a word in the kernel's log.
    drop_caches("4")?;
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let socket = UdpSocket::bind(any).map_err(failed("bind"))?;
    make_room(&socket)?;
    let listener = TcpListener::bind(any).map_err(failed("listen"))?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let served = stream.and_then(serve);
            if let Err(error) = served {
                eprintln!("io-cost: a connection: {error}");
            }
        }
    });
    println!("IO-COST-SERVES price={:.4}", idler.price);
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).map_err(failed("recv"))?;
        let request = buffer.get(..length).unwrap_or_default();
        match *request {
            [ECHO, times, ..] => {
                for _ in 0..times {
                    socket.send_to(request, from).map_err(failed("send"))?;
                }
            }
            [what @ (MARK | DROP), ..] => {
                if what == DROP {
                    // Clean pages.
                    drop_caches("1")?;
                }
                let work = idler.work().to_le_bytes();
                socket.send_to(&work, from).map_err(failed("send"))?;
            }
            _ => {}
        }
    }
}

fn drop_caches(what: &str) -> Result<()> {
    let file = "/proc/sys/vm/drop_caches";
    std::fs::write(file, what).map_err(failed(file))
}

/// One connection, up to its end.
fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let (what, count) = header.split_at(1);
    let count = u64::from_le_bytes(count.try_into().unwrap_or_default());
    match what[0] {
        SINK => {
            take(&mut stream, count)?;
            stream.write_all(&[0])
        }
        SOURCE => give(&mut stream, count),
        _ => {
            let mut byte = [0];
            while stream.read(&mut byte)? == 1 {
                stream.write_all(&byte)?;
            }
            Ok(())
        }
    }
}

/// Reads so many bytes.
pub fn take(stream: &mut TcpStream, mut count: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    while count > 0 {
        let most = buffer.len().min(usize::try_from(count).unwrap_or(CHUNK));
        match stream.read(&mut buffer[..most])? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => count -= n as u64,
        }
    }
    Ok(())
}

/// Writes so many bytes.
pub fn give(stream: &mut TcpStream, mut count: u64) -> std::io::Result<()> {
    let buffer = vec![0; CHUNK];
    while count > 0 {
        let length = buffer.len().min(usize::try_from(count).unwrap_or(CHUNK));
        stream.write_all(&buffer[..length])?;
        count -= length as u64;
    }
    Ok(())
}
