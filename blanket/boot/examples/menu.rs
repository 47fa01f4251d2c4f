//! Shows what a raw disk image would boot: `menu DISK [ENTRY]`.

use std::error::Error;
use std::fs::File;
use std::sync::Arc;

use blanket_boot::{Image, RawFile, initrd};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: menu DISK [ENTRY]")?;
    let wanted = arguments.next();
    let mut image = Image::open(Arc::new(RawFile::new(File::open(path)?)?))?;
    let menu = image.menu()?;
    println!("{:?}, {}", menu.loader, menu.config);
    for (index, entry) in menu.entries.iter().enumerate() {
        println!("{index}: {} [{}]", entry.title, entry.id);
    }
    for note in &menu.notes {
        println!("note: {note}");
    }
    let boot = image.load(menu.pick(wanted.as_deref())?)?;
    println!("{boot:?}");
    match initrd::driver(&boot.initrd, initrd::BLOCK_DRIVER) {
        Ok(driver) => println!("{}: {driver:?}", initrd::BLOCK_DRIVER),
        Err(error) => println!("{error}"),
    }
    Ok(())
}
