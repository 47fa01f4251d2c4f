//! What all nodes say that answer.

use std::collections::HashMap;
use std::sync::Arc;

use hyper::Method;
use serde::de::DeserializeOwned;
use supercloud_api::{Error, Place, Vm};

use crate::agent::Agent;
use crate::client;

impl Agent {
    /// VMs of all nodes that answer, each once: where it runs, if it changes hands.
    ///
    /// # Errors
    /// The disk, `blanket`.
    pub async fn all_vms(self: &Arc<Self>) -> Result<Vec<Vm>, Error> {
        // `node list` shows which ones do not answer.
        let (own, others) = tokio::join!(self.vms(), self.of_others::<Vec<Vm>>("/v1/vms"));
        let mut all = own?;
        all.extend(others?.into_iter().flatten());
        Ok(each_once(all))
    }

    /// A VM, wherever it is.
    ///
    /// # Errors
    /// No node that answers has it.
    pub async fn find_vm(self: &Arc<Self>, name: &str) -> Result<Vm, Error> {
        let all = self.all_vms().await?;
        all.into_iter().find(|vm| vm.name == name).ok_or_else(|| {
            Error::not_found(
                format!("there is no VM {name}"),
                "`supercloud vm list` shows all, `supercloud node list` nodes that do not answer",
            )
        })
    }

    /// What all other nodes that answer say at a path.
    pub(crate) async fn of_others<T: DeserializeOwned + Send + 'static>(
        self: &Arc<Self>,
        path: &'static str,
    ) -> Result<Vec<T>, Error> {
        let own = self.name();
        let mut asking = Vec::new();
        for member in self.members()?.members {
            if member.name != own {
                let agent = Arc::clone(self);
                asking.push(tokio::spawn(async move {
                    let mut there = agent.connect(&member.name).await?;
                    let answer = there.ask(Method::GET, path, None::<&()>, client::ANSWER);
                    answer.await
                }));
            }
        }
        let mut all = Vec::new();
        for asked in asking {
            if let Ok(Ok::<T, Error>(answer)) = asked.await {
                all.push(answer);
            }
        }
        Ok(all)
    }
}

/// How much a node's word about a VM counts, if two say something.
fn weight(vm: &Vm) -> u8 {
    let lives = matches!(
        vm.seen.phase.as_str(),
        "running" | "sending" | "standing" | "doubt" | "pulling" | "lost"
    );
    match (&vm.place, lives) {
        (_, true) => 3,
        (Place::Here, false) => 2,
        (Place::Leaving { .. }, false) => 1,
        (Place::Coming { .. }, false) => 0,
    }
}

fn each_once(all: Vec<Vm>) -> Vec<Vm> {
    let mut best: HashMap<String, Vm> = HashMap::new();
    for vm in all {
        match best.get(&vm.uuid) {
            Some(other) if weight(other) >= weight(&vm) => {}
            _ => {
                best.insert(vm.uuid.clone(), vm);
            }
        }
    }
    let mut all: Vec<Vm> = best.into_values().collect();
    all.sort_by(|a, b| (&a.name, &a.node).cmp(&(&b.name, &b.node)));
    all
}
