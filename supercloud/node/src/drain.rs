//! All VMs of a node go to others that have room.

use std::sync::Arc;
use std::time::Duration;

use supercloud_api::{
    Code, Drain, Error, Kind, Life, Migrate, Operation, OperationState, Part, Place, PostCopy, Step,
};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::agent::{Agent, lock};
use crate::events::now_ms;
use crate::record::{Move, OPERATIONS, VMS};

/// How often it is looked whether a VM has moved.
const LOOK: Duration = Duration::from_millis(300);

impl Agent {
    /// Begins to move all VMs away.
    ///
    /// # Errors
    /// The disk, or another operation of that identity.
    pub fn drain(self: &Arc<Self>, wanted: &Drain) -> Result<Operation, Error> {
        let id = match &wanted.id {
            Some(id) => {
                supercloud_api::name("an operation", id)?;
                id.clone()
            }
            None => Self::new_id()?,
        };
        if let Ok(present) = self.operation(&id) {
            if present.kind == Kind::Drain {
                return Ok(present);
            }
            return Err(Error::new(
                Code::Conflict,
                format!("the operation {id} is another one"),
                "choose another identity, or none",
            ));
        }
        let vms = self.store.all(VMS)?;
        let parts = vms
            .into_iter()
            .filter(|vm| !matches!(vm.place, Place::Coming { .. }));
        let now = now_ms();
        let record = Move {
            shown: Operation {
                id: id.clone(),
                kind: Kind::Drain,
                node: self.name(),
                vm: None,
                to: None,
                state: OperationState::Runs,
                step: Step::Moving,
                progress: None,
                parts: parts
                    .map(|vm| Part {
                        to: None,
                        operation: None,
                        // Who drains a node may want to give it back, with all that is on it.
                        error: (vm.life != Life::Running).then(|| {
                            Error::new(
                                Code::Conflict,
                                format!("{} does not run", vm.name),
                                "start it, and drain again; or remove it",
                            )
                        }),
                        downtime_ms: None,
                        vm: vm.name,
                    })
                    .collect(),
                error: None,
                begun_ms: now,
                changed_ms: now,
            },
            uuid: String::new(),
            kept: false,
            max_downtime_ms: None,
            post_copy: PostCopy::Never,
            bandwidth: None,
            streams: None,
            dry_run: false,
            prepared: None,
            begun: true,
            cancelled: false,
            at_once: wanted.at_once.unwrap_or(1).clamp(1, 16),
        };
        self.store
            .change(|change| change.put(OPERATIONS, &id, &record))?;
        self.drive_drain(&id);
        Ok(record.shown)
    }

    /// Goes on with a drain, unless somebody does.
    pub(crate) fn drive_drain(self: &Arc<Self>, id: &str) {
        {
            let mut driven = lock(&self.driven);
            if driven.contains_key(id) {
                return;
            }
            driven.insert(id.to_owned(), Arc::new(Notify::new()));
        }
        let (agent, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            if let Err(error) = agent.drained(&id).await {
                tracing::warn!("the drain {id}: {error}");
            }
            lock(&agent.driven).remove(&id);
        });
    }

    async fn drained(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let found: Option<Move> = self.store.get(OPERATIONS, id)?;
        let Some(it) = found else { return Ok(()) };
        let turns = Arc::new(Semaphore::new(it.at_once as usize));
        let mut all = JoinSet::new();
        for part in it.shown.parts {
            if part.error.is_some() || part.downtime_ms.is_some() {
                continue;
            }
            let (agent, id, turns) = (Arc::clone(self), id.to_owned(), Arc::clone(&turns));
            all.spawn(async move {
                // It is never closed.
                let _turn = turns.acquire().await;
                let done = if agent.is_cancelled(&id)? {
                    Err(cancelled(&part.vm))
                } else {
                    agent.away(&id, &part.vm).await
                };
                agent.change_move(&id, |it| {
                    let of_vm = it.shown.parts.iter_mut().find(|it| it.vm == part.vm);
                    if let Some(of_vm) = of_vm {
                        match done {
                            Ok(moved) => {
                                of_vm.operation = Some(moved.id);
                                of_vm.to = moved.to;
                                let progress = moved.progress.and_then(|it| it.downtime_ms);
                                of_vm.downtime_ms = Some(progress.unwrap_or(0));
                                of_vm.error = None;
                            }
                            Err(error) => of_vm.error = Some(error),
                        }
                    }
                })
            });
        }
        while let Some(done) = all.join_next().await {
            done.map_err(|error| Error::failed(error.to_string()))??;
        }
        self.change_move(id, |it| {
            let failed = it.shown.parts.iter().filter(|part| part.error.is_some());
            let failed: Vec<&str> = failed.map(|part| part.vm.as_str()).collect();
            it.shown.step = Step::Over;
            it.shown.state = OperationState::Done;
            if !failed.is_empty() {
                it.shown.state = OperationState::Failed;
                it.shown.error = Some(Error::new(
                    Code::Failed,
                    format!("still here: {}", failed.join(", ")),
                    "the list says why",
                ));
            }
        })?;
        Ok(())
    }

    /// Moves one VM to the node with the most room that takes it.
    async fn away(self: &Arc<Self>, drain: &str, vm: &str) -> Result<Operation, Error> {
        let mut nodes: Vec<(u64, String)> = self
            .nodes()
            .await?
            .into_iter()
            .filter(|node| !node.here)
            .filter_map(|node| Some((node.status?.memory_available, node.name)))
            .collect();
        nodes.sort_by(|a, b| b.cmp(a));
        let mut last = Error::new(
            Code::Unreachable,
            "there is no other node that answers",
            "`supercloud node list` shows them",
        );
        for (_, to) in nodes {
            if self.is_cancelled(drain)? {
                return Err(cancelled(vm));
            }
            // The same again when this agent was killed meanwhile.
            let sum = blake3::hash(format!("{drain} {vm} {to}").as_bytes()).to_hex();
            let id = format!("drain-{}", sum.get(..24).unwrap_or_default());
            let wanted = Migrate {
                id: Some(id.clone()),
                to,
                max_downtime_ms: None,
                post_copy: PostCopy::Never,
                bandwidth: None,
                streams: None,
                dry_run: false,
            };
            let mut operation = match self.migrate(vm, &wanted).await {
                Ok(operation) => operation,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            while !operation.is_over() {
                tokio::time::sleep(LOOK).await;
                if self.is_cancelled(drain)?
                    && let Err(error) = self.cancel(&id).await
                {
                    tracing::info!("{vm}: {error}");
                }
                operation = self.operation(&id)?;
            }
            match (operation.state, operation.error.clone()) {
                (OperationState::Done, _) => return Ok(operation),
                (_, Some(error)) => last = error,
                (_, None) => {}
            }
        }
        Err(last)
    }

    fn is_cancelled(&self, id: &str) -> Result<bool, Error> {
        let found: Option<Move> = self.store.get(OPERATIONS, id)?;
        Ok(found.is_none_or(|it| it.cancelled))
    }
}

fn cancelled(vm: &str) -> Error {
    Error::new(Code::Cancelled, format!("{vm} stays, as it was asked"), "")
}
