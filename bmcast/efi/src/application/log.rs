//! What the VMM says: on the first serial port, if the machine's owner wants that ([`to_serial`]), and in
//! memory, from where a status report takes it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;

use super::cpu::{inb, outb};

/// COM1.
const PORT: u16 = 0x3f8;

static SERIAL: AtomicBool = AtomicBool::new(false);
static LINE: Mutex<()> = Mutex::new(());

/// Has it on the serial port from now on.
pub fn to_serial(on: bool) {
    SERIAL.store(on, Ordering::Relaxed);
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: COM1's registers (16550A): the line status, bit 5, says that it takes a byte; where there
            // is no port it reads as ones. Writing a byte changes nothing else.
            unsafe {
                for _ in 0..100_000 {
                    if inb(PORT + 5) & 0x20 != 0 {
                        break;
                    }
                }
                outb(PORT, byte);
            }
        }
        Ok(())
    }
}

/// Says one line.
pub fn line(text: fmt::Arguments<'_>) {
    if SERIAL.load(Ordering::Relaxed) {
        let _line = LINE.lock();
        // Serial's write never fails.
        let _ = write!(Serial, "bmcast: {text}\r\n");
    }
}

/// Says one line, as `println!`.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => { $crate::application::log::line(format_args!($($argument)*)) };
}
