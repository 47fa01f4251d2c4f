//! What must be done, from what there is to what is wanted.

use crate::names;
use crate::state::{Kind, State, Step};
use crate::wanted::{Mac, Network, Wanted};

/// The steps from `is` to `wanted`, in an order in which each is possible. `is` has only what is ours.
pub fn plan(is: &State, wanted: &State) -> Vec<Step> {
    let mut plan = Plan {
        is: is.clone(),
        steps: Vec::new(),
    };
    plan.remove_links(wanted);
    plan.make_links(wanted);
    plan.wireguard(wanted);
    plan.addresses(wanted);
    plan.tables(wanted);
    plan.routes(wanted);
    plan.steps
}

/// The same for one VM only, which has moved: what the kernel has may be asked for or not.
pub fn moved(wanted: &Wanted, network: &Network, mac: Mac) -> Vec<Step> {
    let (bridge, vxlan) = (names::bridge(network.vni), names::vxlan(network.vni));
    let Some(vm) = network.ports.iter().find(|vm| vm.mac == mac) else {
        return Vec::new();
    };
    if !network.is_on(wanted.node) {
        return Vec::new();
    }
    if vm.node == wanted.node {
        return vec![Step::Forward(bridge, mac, names::tap(mac))];
    }
    // The way there first.
    let there = wanted.fabric_address(vm.node);
    vec![
        Step::Tunnel(vxlan.clone(), mac, there),
        Step::Forward(bridge, mac, vxlan),
    ]
}

struct Plan {
    /// What there is after the steps so far.
    is: State,
    steps: Vec<Step>,
}

impl Plan {
    fn step(&mut self, step: Step) {
        self.is.after(&step);
        self.steps.push(step);
    }

    fn remove_links(&mut self, wanted: &State) {
        let names: Vec<String> = self.is.links.keys().cloned().collect();
        for name in names {
            // It may have gone with the other end of its pair.
            let Some(link) = self.is.links.get(&name) else {
                continue;
            };
            if wanted
                .links
                .get(&name)
                .is_none_or(|other| other.kind != link.kind)
            {
                self.step(Step::Delete(name));
            }
        }
    }

    fn make_links(&mut self, wanted: &State) {
        let missing = |is: &State, bridges: bool| {
            wanted
                .links
                .iter()
                .filter(|(_, link)| (link.kind == Kind::Bridge) == bridges)
                .filter(|(name, _)| !is.links.contains_key(*name))
                .map(|(name, link)| (name.clone(), link.clone()))
                .collect::<Vec<_>>()
        };
        for bridges in [true, false] {
            for (name, link) in missing(&self.is, bridges) {
                // Its other end may have brought it.
                if !self.is.links.contains_key(&name) {
                    self.step(Step::Create(name, link.kind, link.mac));
                }
            }
        }
        for (name, link) in &wanted.links {
            let Some(is) = self.is.links.get(name).cloned() else {
                continue;
            };
            if let Some(mac) = link.mac.filter(|mac| is.mac != Some(*mac)) {
                self.step(Step::Mac(name.clone(), mac));
            }
            if is.port.as_ref().map(|port| &port.bridge)
                != link.port.as_ref().map(|port| &port.bridge)
            {
                let bridge = link.port.as_ref().map(|port| port.bridge.clone());
                self.step(Step::Join(name.clone(), bridge));
            }
            let now = self.is.links.get(name).and_then(|link| link.port.clone());
            if let Some(port) = link.port.clone().filter(|port| now.as_ref() != Some(port)) {
                self.step(Step::PortFlags(name.clone(), port));
            }
        }
        // A bridge takes the smallest MTU of its ports until it is told one.
        for (name, link) in &wanted.links {
            if self.is.links.get(name).is_some_and(|is| is.mtu != link.mtu) {
                self.step(Step::Mtu(name.clone(), link.mtu));
            }
        }
        for (path, value) in &wanted.settings {
            if self.is.settings.get(path) != Some(value) {
                self.step(Step::Set(path.clone(), value.clone()));
            }
        }
        for (name, link) in &wanted.links {
            if self.is.links.get(name).is_some_and(|is| is.up != link.up) {
                self.step(Step::Up(name.clone(), link.up));
            }
        }
    }

    fn wireguard(&mut self, wanted: &State) {
        let want = &wanted.wireguard;
        let Some(key) = want.key else {
            return;
        };
        if self.is.wireguard.key != want.key || self.is.wireguard.port != want.port {
            self.step(Step::Keys(key, want.port));
        }
        let strangers: Vec<_> = self.is.wireguard.peers.keys().copied().collect();
        for key in strangers {
            if !want.peers.contains_key(&key) {
                self.step(Step::NoPeer(key));
            }
        }
        for (key, peer) in &want.peers {
            let good = self.is.wireguard.peers.get(key).is_some_and(|is| {
                is.allowed == peer.allowed
                    && (peer.endpoint.is_none() || is.endpoint == peer.endpoint)
            });
            if !good {
                self.step(Step::Peer(*key, peer.clone()));
            }
        }
    }

    fn addresses(&mut self, wanted: &State) {
        // A device that loses its last address forgets its neighbours and routes.
        for (name, net) in &wanted.addresses {
            if !self.is.addresses.contains(&(name.clone(), *net)) {
                self.step(Step::Address(name.clone(), *net));
            }
        }
        for (name, net) in self.is.addresses.clone() {
            if !wanted.addresses.contains(&(name.clone(), net)) {
                self.step(Step::NoAddress(name, net));
            }
        }
    }

    fn tables(&mut self, wanted: &State) {
        // New entries before old ones go: a MAC is never without one.
        for (name, mac, to) in &wanted.tunnels {
            if !self.is.tunnels.contains(&(name.clone(), *mac, *to)) {
                self.step(Step::Tunnel(name.clone(), *mac, *to));
            }
        }
        for ((bridge, mac), port) in &wanted.forwards {
            if self.is.forwards.get(&(bridge.clone(), *mac)) != Some(port) {
                self.step(Step::Forward(bridge.clone(), *mac, port.clone()));
            }
        }
        for (name, mac, to) in self.is.tunnels.clone() {
            if !wanted.tunnels.contains(&(name.clone(), mac, to)) {
                self.step(Step::NoTunnel(name, mac, to));
            }
        }
        for ((bridge, mac), port) in self.is.forwards.clone() {
            if !wanted.forwards.contains_key(&(bridge.clone(), mac)) {
                self.step(Step::NoForward(bridge, mac, port));
            }
        }
        for (name, ip) in self.is.neighbours.clone().into_keys() {
            if !wanted.neighbours.contains_key(&(name.clone(), ip)) {
                self.step(Step::NoNeighbour(name, ip));
            }
        }
        for ((name, ip), mac) in &wanted.neighbours {
            if self.is.neighbours.get(&(name.clone(), *ip)) != Some(mac) {
                self.step(Step::Neighbour(name.clone(), *ip, *mac));
            }
        }
    }

    fn routes(&mut self, wanted: &State) {
        for (mark, name) in self.is.rules.clone() {
            if !wanted.rules.contains(&(mark, name.clone())) {
                self.step(Step::NoRule(mark, name));
            }
        }
        for (table, detour) in self.is.detours.clone() {
            if wanted
                .detours
                .get(&table)
                .is_none_or(|other| *other != detour)
            {
                self.step(Step::NoDetour(table, detour));
            }
        }
        for (table, detour) in &wanted.detours {
            if !self.is.detours.contains_key(table) {
                self.step(Step::Detour(*table, detour.clone()));
            }
        }
        for (mark, name) in &wanted.rules {
            if !self.is.rules.contains(&(*mark, name.clone())) {
                self.step(Step::Rule(*mark, name.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests;
