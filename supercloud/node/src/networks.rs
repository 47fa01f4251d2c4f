//! Where virtual networks come in: what makes a VM's port, has it follow the VM, and takes it
//! away again.

use std::future::Future;
use std::pin::Pin;

use supercloud_api::{Code, Error, NetPort};

/// Work of a [`Networks`].
pub type Doing<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// Networks of VMs on one node.
pub trait Networks: Send + Sync {
    /// Whether a port could be made here; asked before a VM is started or comes.
    fn can_attach<'a>(&'a self, port: &'a NetPort) -> Doing<'a, ()>;
    /// Makes a VM's port, or finds it: what `blanket run --net` is to be given. Twice is as
    /// once.
    fn attach<'a>(&'a self, vm: &'a str, port: &'a NetPort) -> Doing<'a, String>;
    /// The VM runs here from now on: who sends to its port is to send here.
    fn moved<'a>(&'a self, vm: &'a str, port: &'a NetPort) -> Doing<'a, ()>;
    /// A VM is removed for good: its address is free. Twice is as once.
    fn release<'a>(&'a self, _vm: &'a str, _port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    /// Takes a VM's port away: it does not run here any more. Twice is as once.
    fn detach<'a>(&'a self, vm: &'a str, port: &'a NetPort) -> Doing<'a, ()>;
}

/// Networks that the user has made on each node: `tap=NAME` and `user`, with options, as
/// `blanket run --net` takes them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given;

impl Given {
    fn check(port: &NetPort) -> Result<(), Error> {
        let kind = port.net.split([',', '=']).next().unwrap_or_default();
        if matches!(kind, "tap" | "user") {
            return Ok(());
        }
        Err(Error::new(
            Code::BadRequest,
            format!("{:?} is no network of this node", port.net),
            "give a virtual network (supercloud net list), a tap that is there, tap=NAME, or user",
        ))
    }
}

impl Networks for Given {
    fn can_attach<'a>(&'a self, port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async { Self::check(port) })
    }

    fn attach<'a>(&'a self, _vm: &'a str, port: &'a NetPort) -> Doing<'a, String> {
        Box::pin(async {
            Self::check(port)?;
            let has_mac = port.net.split(',').any(|option| option.starts_with("mac="));
            Ok(if has_mac {
                port.net.clone()
            } else {
                format!("{},mac={}", port.net, port.mac)
            })
        })
    }

    fn moved<'a>(&'a self, _vm: &'a str, _port: &'a NetPort) -> Doing<'a, ()> {
        // The VM's own announcement is enough for bridges.
        Box::pin(async { Ok(()) })
    }

    fn detach<'a>(&'a self, _vm: &'a str, _port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}
