//! What can be asked.

/// How it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Method {
    /// Changes nothing.
    Get,
    /// Makes something, or makes it so; twice is as once.
    Put,
    /// Has something done.
    Post,
    /// Removes something; twice is as once.
    Delete,
}

impl Method {
    /// Its word in HTTP.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Post => "POST",
            Self::Delete => "DELETE",
        }
    }
}

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The node's own user, at its socket.
    Local,
    /// He, and nodes with a certificate of the cluster.
    Member,
    /// Everybody who reaches the node's port.
    Anyone,
}

/// One thing that can be asked.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// How.
    pub method: Method,
    /// Where, with names in braces.
    pub path: &'static str,
    /// By whom.
    pub door: Door,
    /// What it does.
    pub what: &'static str,
    /// The type of its body.
    pub request: Option<&'static str>,
    /// The type of its answer: a name, `[name]` for a list of them, or a media type.
    pub response: &'static str,
}

const fn route(
    method: Method,
    path: &'static str,
    door: Door,
    request: Option<&'static str>,
    response: &'static str,
    what: &'static str,
) -> Route {
    Route {
        method,
        path,
        door,
        what,
        request,
        response,
    }
}

use Door::{Anyone, Local, Member};
use Method::{Delete, Get, Post, Put};

/// All that can be asked.
pub const ROUTES: &[Route] = &[
    route(
        Get,
        "/v1/openapi.json",
        Member,
        None,
        "application/json",
        "This document",
    ),
    route(
        Get,
        "/v1/node",
        Member,
        None,
        "NodeStatus",
        "What the node says of itself",
    ),
    route(
        Get,
        "/v1/nodes",
        Member,
        None,
        "[Node]",
        "The nodes, as this one sees them",
    ),
    route(
        Delete,
        "/v1/nodes/{name}",
        Member,
        Some("Remove"),
        "Members",
        "Remove a node; only where the CA's key is",
    ),
    route(
        Get,
        "/v1/members",
        Member,
        None,
        "Members",
        "Who belongs to the cluster",
    ),
    route(
        Post,
        "/v1/tokens",
        Member,
        Some("NewToken"),
        "TokenText",
        "Make a token by which a node joins; only where the CA's key is",
    ),
    route(
        Post,
        "/v1/join",
        Anyone,
        Some("JoinRequest"),
        "JoinAnswer",
        "Join by a token's secret; only where the CA's key is",
    ),
    route(
        Post,
        "/v1/cluster",
        Local,
        Some("JoinCluster"),
        "Members",
        "Have this node, which is alone, join a cluster",
    ),
    route(
        Get,
        "/v1/nets",
        Member,
        None,
        "Nets",
        "The virtual networks, as this node knows them",
    ),
    route(
        Put,
        "/v1/nets/{name}",
        Member,
        Some("NewNet"),
        "Net",
        "Have a virtual network",
    ),
    route(
        Delete,
        "/v1/nets/{name}",
        Member,
        None,
        "Nets",
        "Remove a virtual network that has no VMs",
    ),
    route(
        Put,
        "/v1/nets/{name}/ports/{mac}",
        Member,
        Some("NewNetAddress"),
        "Net",
        "Give a VM an address, or say where it is; only where the CA's key is",
    ),
    route(
        Delete,
        "/v1/nets/{name}/ports/{mac}",
        Member,
        None,
        "Nets",
        "Take a VM's address back; only where the CA's key is",
    ),
    route(
        Put,
        "/v1/net-nodes/{name}",
        Member,
        Some("NetNode"),
        "Nets",
        "Give a node a number in virtual networks; only where the CA's key is",
    ),
    route(
        Post,
        "/v1/net-moves",
        Member,
        Some("NetMoved"),
        "application/json",
        "A VM runs on another node now",
    ),
    route(
        Post,
        "/v1/drain",
        Member,
        Some("Drain"),
        "Operation",
        "Move all VMs of this node to others with room",
    ),
    route(
        Get,
        "/v1/doctor",
        Member,
        None,
        "[Finding]",
        "What is wrong, and what mends it",
    ),
    route(
        Get,
        "/v1/cpu",
        Member,
        None,
        "NodeCpu",
        "What VMs find in the node's CPU; ?host=module or ?host=kvm: on that",
    ),
    route(
        Get,
        "/v1/vms",
        Member,
        None,
        "[Vm]",
        "VMs of this node; ?all=true of all nodes that can be reached",
    ),
    route(
        Get,
        "/v1/vms/{name}",
        Member,
        None,
        "Vm",
        "A VM of this node; ?all=true of any",
    ),
    route(
        Put,
        "/v1/vms/{name}",
        Member,
        Some("VmSpec"),
        "Vm",
        "Have a VM, and run it if it is new",
    ),
    route(
        Delete,
        "/v1/vms/{name}",
        Member,
        None,
        "application/json",
        "Remove a VM that does not run, with its disks",
    ),
    route(
        Post,
        "/v1/vms/{name}/start",
        Member,
        None,
        "Vm",
        "Start a VM",
    ),
    route(
        Post,
        "/v1/vms/{name}/stop",
        Member,
        Some("Stop"),
        "Vm",
        "Stop a VM",
    ),
    route(
        Post,
        "/v1/vms/{name}/migrate",
        Member,
        Some("Migrate"),
        "Operation",
        "Move a VM to another node while it runs",
    ),
    route(
        Post,
        "/v1/vms/{name}/keep",
        Member,
        Some("Keep"),
        "Vm",
        "By its user's word, a VM whose place is in doubt is here",
    ),
    route(
        Get,
        "/v1/vms/{name}/log",
        Member,
        None,
        "text/plain",
        "What a VM has written to its console",
    ),
    route(
        Get,
        "/v1/vms/{name}/console",
        Member,
        None,
        "application/octet-stream",
        "A VM's console: the connection becomes it (Upgrade: supercloud-console)",
    ),
    route(
        Post,
        "/v1/vms/{name}/snapshot",
        Member,
        Some("TakeSnapshot"),
        "Snapshot",
        "Take a snapshot of a VM that runs, or is stopped",
    ),
    route(
        Post,
        "/v1/vms/{name}/clone",
        Member,
        Some("CloneVm"),
        "Vm",
        "Make another VM that goes on from the same moment, or boots with what is in its disks",
    ),
    route(
        Get,
        "/v1/snapshots",
        Member,
        None,
        "[Snapshot]",
        "Snapshots of this node; with ?all=true, of all nodes that answer",
    ),
    route(
        Get,
        "/v1/snapshots/{name}",
        Member,
        None,
        "Snapshot",
        "One of them, whichever node has it",
    ),
    route(
        Delete,
        "/v1/snapshots/{name}",
        Member,
        None,
        "application/json",
        "Remove a snapshot of this node",
    ),
    route(
        Post,
        "/v1/snapshots/{name}/restore",
        Member,
        Some("Restore"),
        "Vm",
        "Have a VM go on here from a snapshot, or boot, whichever node has that",
    ),
    route(
        Post,
        "/v1/snapshots/{name}/export",
        Member,
        Some("ExportTo"),
        "Snapshot",
        "Write a snapshot to a file of the node",
    ),
    route(
        Post,
        "/v1/snapshots",
        Member,
        Some("ImportFrom"),
        "Snapshot",
        "Read a snapshot from a file of the node",
    ),
    route(
        Get,
        "/v1/operations",
        Member,
        None,
        "[Operation]",
        "Operations of this node",
    ),
    route(
        Get,
        "/v1/operations/{id}",
        Member,
        None,
        "Operation",
        "One of them",
    ),
    route(
        Post,
        "/v1/operations/{id}/cancel",
        Member,
        None,
        "Operation",
        "Cancel it, if it is not too late",
    ),
    route(
        Get,
        "/v1/images",
        Member,
        None,
        "[Image]",
        "Images of this node",
    ),
    route(
        Put,
        "/v1/images/{name}",
        Member,
        Some("AddImage"),
        "Image",
        "Keep a file of the node as an image",
    ),
    route(
        Delete,
        "/v1/images/{name}",
        Member,
        None,
        "application/json",
        "Forget a name of an image, and the image if nothing stands on it",
    ),
    route(
        Get,
        "/v1/blobs/{hash}",
        Member,
        None,
        "application/octet-stream",
        "An image's bytes",
    ),
    route(
        Get,
        "/v1/events",
        Member,
        None,
        "text/event-stream",
        "What happens on this node",
    ),
    route(
        Get,
        "/v1/metrics",
        Member,
        None,
        "text/plain",
        "Figures in Prometheus' format",
    ),
    route(
        Put,
        "/v1/arrivals/{operation}",
        Member,
        Some("Prepare"),
        "Prepared",
        "Make ready for a VM that moves here",
    ),
    route(
        Get,
        "/v1/arrivals/{operation}",
        Member,
        None,
        "Arrival",
        "What became of it",
    ),
    route(
        Post,
        "/v1/arrivals/{operation}/claim",
        Member,
        None,
        "Arrival",
        "Its source has ended: it runs here, if all of it is here",
    ),
    route(
        Post,
        "/v1/arrivals/{operation}/bereave",
        Member,
        None,
        "Arrival",
        "Its source has ended with a part of its memory: it is ended here, if that is missing",
    ),
    route(
        Delete,
        "/v1/arrivals/{operation}",
        Member,
        None,
        "Arrival",
        "It does not come: clear away what was prepared, unless it runs here",
    ),
];
