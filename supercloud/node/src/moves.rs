//! VMs that go to other nodes: the source's agent drives each move by [`next`], step by
//! step, and goes on with it after it was killed.

use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use supercloud_api::{
    Arrival, ArrivalState, Code, Error, Image, Kind, Life, MOST_STREAMS, Migrate, Operation,
    OperationState, Place, Prepare, Prepared, Progress, Step,
};
use tokio::sync::Notify;

use crate::agent::{Agent, lock};
use crate::blanket::{Outcome, Phase, Wishes, is_moving, said_moved};
use crate::client;
use crate::events::now_ms;
use crate::fail;
use crate::logic::{Next, View, next};
use crate::record::{Move, OPERATIONS, VMS, VmRecord};
use crate::vms::is_here;

/// How long it is waited before it is looked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long at most, when nothing changes.
const RARELY: Duration = Duration::from_secs(15);
/// How long a lost destination is tried in one go, seconds.
const PATIENCE: u64 = 20;
/// How long a destination may take to make itself ready: it may have to fetch images.
const PREPARE: Duration = Duration::from_secs(3600);
/// Operations that are over are remembered, so many.
const REMEMBERED: usize = 200;

impl Agent {
    /// Begins to move a VM; the operation of an identity that is there already is that one.
    ///
    /// # Errors
    /// It cannot begin.
    pub async fn migrate(
        self: &Arc<Self>,
        name: &str,
        wanted: &Migrate,
    ) -> Result<Operation, Error> {
        let id = match &wanted.id {
            Some(id) => {
                supercloud_api::name("an operation", id)?;
                id.clone()
            }
            None => Self::new_id()?,
        };
        let _alone = self.alone_with(name).await;
        if let Some(present) = self.store.get(OPERATIONS, &id)? {
            let shown = self.with_progress(present);
            let same = shown.vm.as_deref() == Some(name) && shown.to.as_ref() == Some(&wanted.to);
            if same {
                return Ok(shown);
            }
            return Err(Error::new(
                Code::Conflict,
                format!("the operation {id} is another one"),
                "choose another identity, or none",
            ));
        }
        if let Some(streams) = wanted.streams
            && !(1..=MOST_STREAMS).contains(&streams)
        {
            return Err(Error::new(
                Code::BadRequest,
                format!("a VM does not move over {streams} connections"),
                format!("say a number from 1 to {MOST_STREAMS}"),
            ));
        }
        let vm = self.record(name)?;
        is_here(&vm)?;
        let to = &wanted.to;
        if *to == self.name() {
            return Err(Error::new(
                Code::Conflict,
                format!("{name} is on {to} already"),
                "",
            ));
        }
        self.member(to)?;
        let phase = self.observe().await?.get(&vm.uuid).map(|it| it.phase);
        if vm.life != Life::Running || phase != Some(Phase::Running) {
            return Err(Error::new(
                Code::Conflict,
                format!("{name} does not run"),
                format!("start it first: supercloud vm start {name}"),
            ));
        }
        let now = now_ms();
        let record = Move {
            shown: Operation {
                id: id.clone(),
                kind: Kind::Migrate,
                node: self.name(),
                vm: Some(name.into()),
                to: Some(to.clone()),
                state: OperationState::Runs,
                step: Step::Preparing,
                progress: None,
                parts: Vec::new(),
                error: None,
                begun_ms: now,
                changed_ms: now,
            },
            uuid: vm.uuid.clone(),
            kept: false,
            max_downtime_ms: wanted.max_downtime_ms,
            post_copy: wanted.post_copy,
            bandwidth: wanted.bandwidth,
            streams: wanted.streams,
            dry_run: wanted.dry_run,
            prepared: None,
            begun: false,
            cancelled: false,
            at_once: 0,
        };
        self.store.change(|change| {
            change.put(OPERATIONS, &id, &record)?;
            let leaving = VmRecord {
                place: Place::Leaving {
                    operation: id.clone(),
                    to: to.clone(),
                },
                ..vm
            };
            change.put(VMS, name, &leaving)
        })?;
        fail::point("move.recorded");
        self.forget_old()?;
        self.say("vm.leaving", name, format!("{name} is to go to {to}"));
        self.drive(&id);
        Ok(record.shown)
    }

    fn forget_old(&self) -> Result<(), Error> {
        self.store.change(|change| {
            let mut over: Vec<Move> = change.all(OPERATIONS)?;
            over.retain(|it| it.shown.step == Step::Over);
            over.sort_by_key(|it| it.shown.changed_ms);
            let surplus = over.len().saturating_sub(REMEMBERED);
            for old in over.iter().take(surplus) {
                change.remove(OPERATIONS, &old.shown.id)?;
            }
            Ok(())
        })
    }

    /// Drives a move until nothing is left to do, unless somebody does.
    pub(crate) fn drive(self: &Arc<Self>, id: &str) {
        let wake = Arc::new(Notify::new());
        {
            let mut driven = lock(&self.driven);
            if driven.contains_key(id) {
                return;
            }
            driven.insert(id.to_owned(), Arc::clone(&wake));
        }
        let (agent, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            let mut pause = AGAIN;
            loop {
                match agent.step(&id).await {
                    Ok(true) => break,
                    Ok(false) => pause = AGAIN,
                    Err(error) => {
                        tracing::info!("the operation {id}: {error}");
                        tokio::select! {
                            () = tokio::time::sleep(pause) => {}
                            () = wake.notified() => {}
                        }
                        pause = (pause * 2).min(RARELY);
                    }
                }
            }
            lock(&agent.driven).remove(&id);
            lock(&agent.progress).remove(&id);
        });
    }

    /// Goes on with what was not over when the agent ended.
    ///
    /// # Errors
    /// The disk.
    pub fn go_on(self: &Arc<Self>) -> Result<(), Error> {
        for operation in self.store.all(OPERATIONS)? {
            if operation.shown.step != Step::Over {
                match operation.shown.kind {
                    Kind::Migrate => self.drive(&operation.shown.id),
                    Kind::Drain => self.drive_drain(&operation.shown.id),
                }
            }
        }
        Ok(())
    }

    pub(crate) fn change_move(
        &self,
        id: &str,
        work: impl FnOnce(&mut Move),
    ) -> Result<Move, Error> {
        let (changed, step) = self.store.change(|change| {
            let found: Option<Move> = change.get(OPERATIONS, id)?;
            let mut found = found.ok_or_else(|| no_operation(id))?;
            let before = (found.shown.step, found.shown.state);
            work(&mut found);
            found.shown.changed_ms = now_ms();
            change.put(OPERATIONS, id, &found)?;
            let changed = before != (found.shown.step, found.shown.state);
            Ok((found, changed))
        })?;
        if step {
            let shown = &changed.shown;
            let error = shown
                .error
                .as_ref()
                .map_or_else(String::new, |it| format!(": {it}"));
            let text = format!("{:?}, {:?}{error}", shown.step, shown.state).to_lowercase();
            self.say("operation.step", id, text);
        }
        Ok(changed)
    }

    /// Does the next thing for a move. True: nothing is left to do. An error is a reason to
    /// wait for a while.
    async fn step(self: &Arc<Self>, id: &str) -> Result<bool, Error> {
        let found: Option<Move> = self.store.get(OPERATIONS, id)?;
        let Some(it) = found else { return Ok(true) };
        let vm = it.shown.vm.clone().unwrap_or_default();
        let view = self.view(&it).await?;
        let does = next(&view);
        tracing::debug!(?view, ?does, id);
        match does {
            Next::Over => {
                self.change_move(id, |it| it.shown.step = Step::Over)?;
                self.forget_words(id);
                return Ok(true);
            }
            Next::Prepare => match self.prepare_there(&it, &vm).await {
                Ok(prepared) => {
                    fail::point("move.prepared");
                    self.change_move(id, |it| {
                        it.prepared = Some(prepared);
                        it.shown.step = Step::Moving;
                    })?;
                    fail::point("move.prepared-recorded");
                }
                Err(error) => self.stays(&it, &vm, Some(error))?,
            },
            Next::Send => {
                let it = self.change_move(id, |it| it.begun = !it.cancelled)?;
                if !it.begun {
                    return Ok(false);
                }
                fail::point("move.begun");
                let outcome = self.send(&it, &vm, PATIENCE).await;
                fail::point("move.sent");
                self.heard(&it, &vm, outcome)?;
            }
            Next::Follow => {
                if it.cancelled
                    && let Err(error) = self.blanket.cancel(&vm).await
                {
                    tracing::info!("{vm}: {error}");
                }
                // What came of it is looked at afterwards, whoever had begun it.
                let heard = self.hears(id);
                self.blanket.follow(&vm, heard).await;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Next::AskAgain => {
                let outcome = self.send(&it, &vm, 1).await;
                self.heard(&it, &vm, outcome)?;
                // Another try needs something to have changed.
                return self.pause_if_doubt(id);
            }
            Next::KeepHere => {
                self.blanket.keep(&vm).await?;
                let to = it.shown.to.clone().unwrap_or_default();
                let error = Error::new(
                    Code::Failed,
                    format!("the process at {to} ended before it was given the VM"),
                    format!("{vm} runs here; `blanket doctor` at {to} may tell why"),
                );
                self.change_move(id, |it| it.shown.error = Some(error))?;
            }
            Next::ClaimThere => {
                let path = format!("/v1/arrivals/{id}/claim");
                let _: Arrival = self.there(&it, Method::POST, &path).await?;
                fail::point("move.claimed");
            }
            Next::Release => {
                if let Err(error) = self.blanket.kill(&vm).await {
                    // It may have heard of it just then.
                    tracing::info!("{vm}: {error}");
                }
                fail::point("move.released");
            }
            Next::Bereave => {
                let path = format!("/v1/arrivals/{id}/bereave");
                let _: Arrival = self.there(&it, Method::POST, &path).await?;
                fail::point("move.bereft");
            }
            Next::Stays => self.stays(&it, &vm, None)?,
            Next::Gone => {
                // Of a move that another agent had begun.
                let said = said_moved(&self.config.move_says(id));
                self.change_move(id, |it| {
                    it.shown.step = Step::Leaving;
                    it.shown.state = OperationState::Runs;
                    it.shown.progress = said.or(it.shown.progress.take());
                })?;
            }
            Next::Finish => {
                fail::point("move.finishing");
                let _alone = self.alone_with(&vm).await;
                let record: Option<VmRecord> = self.store.get(VMS, &vm)?;
                if let Some(record) = record.filter(|record| record.uuid == it.uuid) {
                    self.forget(&record).await?;
                }
                fail::point("move.forgotten");
                let to = it.shown.to.unwrap_or_default();
                let lost = view.destination == Some(ArrivalState::Bereft);
                self.change_move(id, |it| {
                    it.shown.step = Step::Over;
                    it.shown.state = OperationState::Done;
                    it.shown.error = None;
                    if lost {
                        it.shown.state = OperationState::Failed;
                        it.shown.error = Some(Error::new(
                            Code::Failed,
                            format!(
                                "{vm} went to {to}, and its process here ended before all of its \
                                 memory had followed it: it was ended there"
                            ),
                            format!(
                                "its disks are there as after a power failure: supercloud vm start {vm}"
                            ),
                        ));
                    }
                })?;
                let said = if lost { "was ended" } else { "runs" };
                self.say("vm.moved", &vm, format!("{vm} {said} on {to}"));
                return Ok(true);
            }
            Next::Clear => return Err(Error::failed("its destination has not cleared away yet")),
            Next::Wait => tokio::time::sleep(Duration::from_millis(200)).await,
            Next::Doubt => {
                let to = it.shown.to.clone().unwrap_or_default();
                let error = Error::new(
                    Code::Doubt,
                    format!(
                        "the process of {vm} has ended here, and {to} does not say whether it has it"
                    ),
                    format!(
                        "start the agent of {to}; if that is gone for good, `supercloud vm keep {vm}` \
                         lets you start it here as its disks are"
                    ),
                );
                self.in_doubt(id, error)?;
                return self.pause_if_doubt(id);
            }
        }
        Ok(false)
    }

    fn forget_words(&self, id: &str) {
        // None, if nothing was sent.
        let _ = std::fs::remove_file(self.config.move_says(id));
    }

    fn pause_if_doubt(&self, id: &str) -> Result<bool, Error> {
        let found: Option<Move> = self.store.get(OPERATIONS, id)?;
        match found.map(|it| it.shown) {
            Some(shown) if shown.state == OperationState::Doubt => {
                Err(shown.error.unwrap_or_else(|| Error::failed("in doubt")))
            }
            _ => Ok(false),
        }
    }

    fn in_doubt(&self, id: &str, error: Error) -> Result<(), Error> {
        self.change_move(id, |it| {
            it.shown.state = OperationState::Doubt;
            it.shown.error = Some(error);
        })
        .map(drop)
    }

    /// What is known of a move; the destination is asked where it matters.
    async fn view(self: &Arc<Self>, it: &Move) -> Result<View, Error> {
        let source = self.observe().await?.get(&it.uuid).map(|it| it.phase);
        let path = format!("/v1/arrivals/{}", it.shown.id);
        let gone = matches!(
            source,
            None | Some(Phase::Doubt | Phase::Cut | Phase::Ended)
        );
        let method = match it.shown.step {
            Step::Clearing => Some(Method::DELETE),
            Step::Leaving => Some(Method::GET),
            Step::Moving if gone && it.begun => Some(Method::GET),
            Step::Moving | Step::Preparing | Step::Over => None,
        };
        let destination = match method {
            None => None,
            Some(method) => match self.there::<Arrival>(it, method, &path).await {
                Ok(arrival) => Some(arrival.state),
                // A node that was removed has nothing of ours any more.
                Err(error) if error.code == Code::NotFound => Some(ArrivalState::Unknown),
                Err(error) => {
                    tracing::info!("the operation {}: {error}", it.shown.id);
                    None
                }
            },
        };
        if destination.is_none() && it.shown.step == Step::Leaving && !it.kept {
            let to = it.shown.to.clone().unwrap_or_default();
            return Err(Error::new(
                Code::Unreachable,
                format!("the VM has gone, and the agent of {to} does not answer"),
                format!("start the agent of {to}"),
            ));
        }
        Ok(View {
            step: it.shown.step,
            cancelled: it.cancelled,
            begun: it.begun,
            mover: is_moving(&self.config.move_says(&it.shown.id)),
            kept: it.kept,
            source,
            destination,
        })
    }

    async fn there<T: serde::de::DeserializeOwned>(
        &self,
        it: &Move,
        method: Method,
        path: &str,
    ) -> Result<T, Error> {
        let to = it.shown.to.as_deref().unwrap_or_default();
        let mut agent = self.connect(to).await?;
        agent.ask(method, path, None::<&()>, client::ANSWER).await
    }

    async fn prepare_there(self: &Arc<Self>, it: &Move, name: &str) -> Result<Prepared, Error> {
        let vm = self.vm(name).await?;
        let record = self.record(name)?;
        let mut images: Vec<Image> = Vec::new();
        for hash in record.images() {
            images.extend(self.image(hash)?);
        }
        let asked = Prepare {
            operation: it.shown.id.clone(),
            from: self.name(),
            vm,
            images,
        };
        let to = it.shown.to.as_deref().unwrap_or_default();
        let mut agent = self.connect(to).await?;
        let path = format!("/v1/arrivals/{}", it.shown.id);
        agent.ask(Method::PUT, &path, Some(&asked), PREPARE).await
    }

    fn hears(self: &Arc<Self>, id: &str) -> impl FnMut(Progress) + Send + use<> {
        let (agent, id) = (Arc::clone(self), id.to_owned());
        move |progress: Progress| {
            let text = format!(
                "{}: round {}, {} MiB sent, {} MiB left",
                progress.stage,
                progress.rounds + 1,
                progress.bytes >> 20,
                progress.dirty >> 8
            );
            lock(&agent.progress).insert(id.clone(), progress);
            agent.say("operation.progress", &id, text);
        }
    }

    async fn send(self: &Arc<Self>, it: &Move, vm: &str, patience: u64) -> Outcome {
        let Some(prepared) = &it.prepared else {
            return Outcome::Kept(Error::failed("nobody was prepared for it"));
        };
        let wishes = Wishes {
            max_downtime_ms: it.max_downtime_ms,
            post_copy: it.post_copy,
            bandwidth: it.bandwidth,
            streams: it.streams,
            dry_run: it.dry_run,
            patience,
        };
        let heard = self.hears(&it.shown.id);
        self.blanket
            .migrate(
                vm,
                &prepared.address,
                &prepared.token,
                &wishes,
                &self.config.move_says(&it.shown.id),
                heard,
            )
            .await
    }

    /// What `blanket migrate` ended with.
    fn heard(self: &Arc<Self>, it: &Move, vm: &str, outcome: Outcome) -> Result<(), Error> {
        let id = &it.shown.id;
        match outcome {
            Outcome::Done(progress) if it.dry_run => {
                self.change_move(id, |it| it.shown.progress = Some(progress))?;
                self.stays(it, vm, None)
            }
            Outcome::Done(progress) => self
                .change_move(id, |it| {
                    it.shown.progress = Some(progress);
                    it.shown.step = Step::Leaving;
                    it.shown.state = OperationState::Runs;
                    it.shown.error = None;
                })
                .map(drop),
            Outcome::Kept(error) => {
                let unfit = error.message.contains("cannot have it");
                self.change_move(id, |it| {
                    let code = match error.code {
                        _ if it.cancelled => Code::Cancelled,
                        _ if unfit => Code::Unfit,
                        code => code,
                    };
                    it.shown.error = Some(Error { code, ..error });
                })
                .map(drop)
            }
            Outcome::Doubt(_) => {
                let to = it.shown.to.clone().unwrap_or_default();
                let error = Error::new(
                    Code::Doubt,
                    format!(
                        "{vm} stands still: it changed hands when {to} was lost, and may run there"
                    ),
                    format!(
                        "it is asked again until {to} answers; if that is gone for good, \
                         `supercloud vm keep {vm}` lets it go on here"
                    ),
                );
                self.in_doubt(id, error)
            }
            Outcome::Cut(_) => {
                let to = it.shown.to.clone().unwrap_or_default();
                let error = Error::new(
                    Code::Doubt,
                    format!(
                        "{vm} runs on {to} as far as it has its memory: the link was lost before all \
                         of that had followed it"
                    ),
                    format!("it follows as soon as {to} answers; end nothing here until then"),
                );
                self.in_doubt(id, error)
            }
        }
    }

    /// The VM stays here; the destination is to clear away.
    fn stays(&self, it: &Move, vm: &str, why: Option<Error>) -> Result<(), Error> {
        let id = &it.shown.id;
        self.store.change(|change| {
            let found: Option<Move> = change.get(OPERATIONS, id)?;
            let mut found = found.ok_or_else(|| no_operation(id))?;
            let shown = &mut found.shown;
            let fits = shown.progress.as_ref().is_some_and(|it| it.stage == "fits");
            shown.step = Step::Clearing;
            if fits {
                shown.state = OperationState::Done;
                shown.error = None;
            } else {
                shown.state = OperationState::Failed;
                // By its user's word, or its process', it is in doubt no more.
                let known = why.or(shown.error.take());
                let known = known.filter(|error| error.code != Code::Doubt);
                shown.error = Some(known.unwrap_or_else(|| {
                    if found.cancelled {
                        return Error::new(
                            Code::Cancelled,
                            format!("{vm} stays, as it was asked"),
                            "",
                        );
                    }
                    Error::new(
                        Code::Failed,
                        format!("{vm} has not moved: it or its agent ended before it was given"),
                        format!("`supercloud vm show {vm}` tells how it is"),
                    )
                }));
            }
            shown.changed_ms = now_ms();
            change.put(OPERATIONS, id, &found)?;
            let record: Option<VmRecord> = change.get(VMS, vm)?;
            if let Some(mut record) = record.filter(|record| record.uuid == found.uuid)
                && matches!(&record.place, Place::Leaving { operation, .. } if operation == id)
            {
                record.place = Place::Here;
                change.put(VMS, vm, &record)?;
            }
            Ok(())
        })?;
        fail::point("move.stays");
        self.wake.notify_one();
        self.say("vm.stays", vm, format!("{vm} stays here"));
        Ok(())
    }

    /// By its user's word a VM that leaves is here.
    pub(crate) fn note_kept(&self, id: &str) -> Result<(), Error> {
        self.change_move(id, |it| it.kept = true)?;
        if let Some(wake) = lock(&self.driven).get(id) {
            wake.notify_one();
        }
        Ok(())
    }

    /// Cancels an operation, if it is not too late.
    ///
    /// # Errors
    /// It is.
    pub async fn cancel(self: &Arc<Self>, id: &str) -> Result<Operation, Error> {
        let it = self.change_move(id, |it| {
            if !it.shown.is_over() {
                it.cancelled = true;
            }
        })?;
        fail::point("move.cancelled");
        if let (Some(vm), Step::Moving, true) = (&it.shown.vm, it.shown.step, it.begun) {
            self.blanket.cancel(vm).await.map_err(|error| Error {
                code: Code::Conflict,
                ..error
            })?;
        }
        if let Some(wake) = lock(&self.driven).get(id) {
            wake.notify_one();
        }
        self.operation(id)
    }

    /// An operation.
    ///
    /// # Errors
    /// There is none.
    pub fn operation(&self, id: &str) -> Result<Operation, Error> {
        let found: Option<Move> = self.store.get(OPERATIONS, id)?;
        found
            .map(|it| self.with_progress(it))
            .ok_or_else(|| no_operation(id))
    }

    /// All of them, the last one first.
    ///
    /// # Errors
    /// The disk.
    pub fn operations(&self) -> Result<Vec<Operation>, Error> {
        let all = self.store.all(OPERATIONS)?;
        let mut all: Vec<Operation> = all.into_iter().map(|it| self.with_progress(it)).collect();
        all.sort_by_key(|it| std::cmp::Reverse(it.begun_ms));
        Ok(all)
    }

    fn with_progress(&self, it: Move) -> Operation {
        let mut shown = it.shown;
        if let Some(progress) = lock(&self.progress).get(&shown.id)
            && shown.progress.is_none()
        {
            shown.progress = Some(progress.clone());
        }
        shown
    }
}

pub(crate) fn no_operation(id: &str) -> Error {
    Error::not_found(
        format!("there is no operation {id} here"),
        "`supercloud operation list` shows those of a node; --node NAME",
    )
}
