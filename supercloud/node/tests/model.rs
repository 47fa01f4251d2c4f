//! A model checker walks through every order of what two agents, two processes of one VM, and
//! faults do while the VM moves. The agents' part is the code itself, `supercloud_node::logic`;
//! the processes' is their protocol (`blanket/migration/src/handover.rs`, which has a model of
//! its own). An agent is killed by not doing the rest of what it had begun.

use stateright::{Checker as _, Model, Property};
use supercloud_api::{ArrivalState, Life, Place, Step};
use supercloud_node::blanket::Phase;
use supercloud_node::logic::{Deed, Next, View, deed, next};

/// What the source remembers of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Record {
    Leaving,
    Here,
    Forgotten,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    // What the source's agent has on its disk.
    step: Step,
    begun: bool,
    cancelled: bool,
    record: Record,
    // What the destination's has.
    arrival: ArrivalState,
    coming: bool,
    // The processes.
    source: Option<Phase>,
    destination: Option<Phase>,
    /// A part of its memory follows it.
    post_copy: bool,
    /// All but what follows it is at the destination.
    part: bool,
    /// The destination's token, which is emptied when the VM is given.
    token: bool,
    /// `blanket migrate` was begun, and the source's process has not taken it up.
    ordered: bool,
    /// It has ever run at the destination.
    ran_there: bool,
    // Faults.
    cuts: u8,
    kills: u8,
    lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// The source's agent does the next thing; the destination's agent answers it or not.
    Source {
        answered: bool,
        killed: bool,
    },
    /// The destination's agent looks at what it has.
    Look,
    /// The VM's processes do what comes next.
    Processes,
    /// The link between them breaks.
    Cut,
    /// The user changes his mind.
    Cancel,
    KillSource,
    KillDestination,
    /// Whoever has seen the source end tells the destination's process.
    Mourn,
}

struct Moves;

/// The destination's agent looks at its record, as it does before each answer.
fn look(it: &mut State) {
    if !it.coming {
        if it.arrival == ArrivalState::Here
            && deed(Life::Running, &Place::Here, it.destination) == Deed::Bereave
        {
            bereave(it);
        }
        return;
    }
    let place = Place::Coming {
        operation: "o".into(),
        from: "a".into(),
    };
    match deed(Life::Running, &place, it.destination) {
        Deed::Arrived => {
            it.arrival = ArrivalState::Here;
            it.coming = false;
        }
        Deed::Lost if it.token => {
            it.arrival = ArrivalState::Refused;
            it.coming = false;
        }
        Deed::Lost => it.arrival = ArrivalState::Lost,
        _ => {}
    }
}

fn bereave(it: &mut State) {
    it.destination = None;
    it.arrival = ArrivalState::Bereft;
}

fn said(it: &State) -> ArrivalState {
    match (it.arrival, it.destination) {
        (ArrivalState::Waiting | ArrivalState::Lost, Some(Phase::Received)) => {
            ArrivalState::Received
        }
        (ArrivalState::Here, Some(Phase::Pulling | Phase::Lost)) => ArrivalState::Following,
        (ArrivalState::Here, None) => ArrivalState::Ended,
        (state, _) => state,
    }
}

/// The destination's agent is asked to clear away.
fn clear(it: &mut State) {
    look(it);
    if was_there(it.arrival) || it.arrival == ArrivalState::Unknown {
        return;
    }
    let waits = matches!(
        it.destination,
        Some(Phase::Waiting | Phase::Receiving | Phase::Received)
    );
    if it.destination.is_some() && !waits {
        return;
    }
    it.destination = None;
    it.arrival = ArrivalState::Refused;
    it.coming = false;
}

/// The source's process asks the destination's what became of the VM.
fn ask(it: &mut State) {
    match it.destination {
        Some(Phase::Received) => {
            it.token = false;
            it.destination = Some(Phase::Running);
            it.ran_there = true;
            it.source = None;
        }
        Some(Phase::Receiving) if it.part => {
            it.token = false;
            it.destination = Some(Phase::Pulling);
            it.ran_there = true;
            it.source = Some(Phase::Serving);
        }
        Some(Phase::Pulling) => it.source = Some(Phase::Serving),
        Some(Phase::Running) => it.source = None,
        _ => {}
    }
}

/// It came.
fn was_there(state: ArrivalState) -> bool {
    matches!(
        state,
        ArrivalState::Here | ArrivalState::Ended | ArrivalState::Bereft
    )
}

/// The source's agent; `killed`: in the middle of it.
fn source(it: &mut State, answered: bool, killed: bool) {
    let gone = matches!(
        it.source,
        None | Some(Phase::Doubt | Phase::Cut | Phase::Ended)
    );
    let asks = match it.step {
        Step::Clearing | Step::Leaving => true,
        Step::Moving => gone && it.begun,
        Step::Preparing | Step::Over => false,
    };
    let destination = (asks && answered).then(|| {
        if it.step == Step::Clearing {
            clear(it);
        } else {
            look(it);
        }
        said(it)
    });
    let view = View {
        step: it.step,
        cancelled: it.cancelled,
        begun: it.begun,
        mover: it.ordered,
        kept: false,
        source: it.source,
        destination,
    };
    match next(&view) {
        Next::Prepare => {
            if !answered {
                // What it has done of it, it has.
                stays(it);
                return;
            }
            look(it);
            if it.arrival == ArrivalState::Unknown {
                it.arrival = ArrivalState::Waiting;
                it.coming = true;
                it.token = true;
                it.destination = Some(Phase::Waiting);
            }
            if killed {
                return;
            }
            if it.arrival == ArrivalState::Waiting && it.destination.is_some() {
                it.step = Step::Moving;
            } else {
                stays(it);
            }
        }
        Next::Send => {
            it.begun = true;
            it.ordered = !killed;
        }
        Next::AskAgain => ask(it),
        Next::KeepHere => it.source = Some(Phase::Running),
        Next::ClaimThere => {
            if answered && it.destination == Some(Phase::Received) {
                it.token = false;
                it.destination = Some(Phase::Running);
                it.ran_there = true;
            }
        }
        Next::Release => it.source = None,
        Next::Bereave => {
            if answered {
                look(it);
                if said(it) == ArrivalState::Following {
                    bereave(it);
                }
            }
        }
        Next::Stays => stays(it),
        Next::Gone => it.step = Step::Leaving,
        Next::Finish => {
            it.record = Record::Forgotten;
            if !killed {
                it.step = Step::Over;
            }
        }
        Next::Over => it.step = Step::Over,
        Next::Follow | Next::Clear | Next::Wait | Next::Doubt => {}
    }
}

fn stays(it: &mut State) {
    it.step = Step::Clearing;
    if it.record == Record::Leaving {
        it.record = Record::Here;
    }
}

/// The processes' own protocol.
fn processes(it: &mut State) {
    match (it.source, it.destination) {
        (Some(Phase::Running), Some(Phase::Waiting)) if it.ordered => {
            it.ordered = false;
            it.source = Some(Phase::Sending);
            it.destination = Some(Phase::Receiving);
        }
        // Nobody is there who takes it.
        (Some(Phase::Running), _) => it.ordered = false,
        (Some(Phase::Sending), Some(Phase::Receiving)) => {
            it.source = Some(Phase::Standing);
            if it.post_copy {
                it.part = true;
            } else {
                it.destination = Some(Phase::Received);
            }
        }
        (Some(Phase::Standing), Some(Phase::Received)) => it.source = Some(Phase::Doubt),
        (Some(Phase::Standing), Some(Phase::Receiving)) if it.part => {
            it.source = Some(Phase::Doubt);
        }
        (Some(Phase::Doubt | Phase::Cut), _) => ask(it),
        (Some(Phase::Serving), Some(Phase::Pulling)) => {
            it.source = None;
            it.destination = Some(Phase::Running);
        }
        // The link to who is gone.
        (Some(Phase::Serving), _) => it.source = Some(Phase::Cut),
        _ => {}
    }
}

/// What a link that is lost, at whichever end, does to them.
fn cut(it: &mut State) {
    if matches!(it.source, Some(Phase::Sending | Phase::Standing)) {
        it.source = Some(Phase::Running);
    }
    if it.source == Some(Phase::Serving) {
        it.source = Some(Phase::Cut);
    }
    if it.destination == Some(Phase::Receiving) && !it.part {
        it.destination = None;
    }
}

impl Model for Moves {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let state = |post_copy| State {
            post_copy,
            part: false,
            step: Step::Preparing,
            begun: false,
            cancelled: false,
            record: Record::Leaving,
            arrival: ArrivalState::Unknown,
            coming: false,
            source: Some(Phase::Running),
            destination: None,
            token: false,
            ordered: false,
            ran_there: false,
            cuts: 0,
            kills: 0,
            lost: false,
        };
        vec![state(false), state(true)]
    }

    fn actions(&self, it: &State, actions: &mut Vec<Action>) {
        for answered in [true, false] {
            for killed in [false, true] {
                actions.push(Action::Source { answered, killed });
            }
        }
        actions.extend([Action::Look, Action::Processes]);
        if it.cuts < 2 {
            actions.push(Action::Cut);
        }
        if !it.cancelled && it.step != Step::Over {
            actions.push(Action::Cancel);
        }
        if it.source.is_none() && it.destination == Some(Phase::Pulling) {
            actions.push(Action::Mourn);
        }
        if it.kills < 1 {
            actions.extend([Action::KillSource, Action::KillDestination]);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut it = last.clone();
        match action {
            Action::Source { answered, killed } => source(&mut it, answered, killed),
            Action::Look => look(&mut it),
            Action::Processes => processes(&mut it),
            Action::Cut => {
                it.cuts += 1;
                cut(&mut it);
            }
            Action::Cancel => {
                it.cancelled = true;
                // `blanket migrate --cancel`, where that is not too late.
                if it.source == Some(Phase::Sending) {
                    cut(&mut it);
                }
            }
            Action::KillSource => {
                it.kills += 1;
                it.lost |= it.source.is_some() && it.source != Some(Phase::Doubt);
                it.source = None;
                cut(&mut it);
            }
            Action::KillDestination => {
                it.kills += 1;
                it.lost |= matches!(it.destination, Some(Phase::Running | Phase::Pulling));
                it.destination = None;
                cut(&mut it);
            }
            Action::Mourn => it.destination = Some(Phase::Lost),
        }
        (it != *last).then_some(it)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one runs", |_, it: &State| {
                let here = matches!(it.source, Some(Phase::Running | Phase::Sending));
                let there = matches!(it.destination, Some(Phase::Running | Phase::Pulling));
                !(here && there)
            }),
            Property::always("nobody gives up what the other needs", |_, it: &State| {
                let serves = matches!(it.source, Some(Phase::Serving | Phase::Cut | Phase::Doubt));
                serves || it.destination != Some(Phase::Pulling) || it.kills > 0
            }),
            Property::always(
                "it is ended for want of memory only if that is lost",
                |_, it: &State| it.arrival != ArrivalState::Bereft || it.lost,
            ),
            Property::sometimes("its memory follows it", |_, it: &State| {
                it.step == Step::Over
                    && it.post_copy
                    && it.record == Record::Forgotten
                    && it.kills == 0
            }),
            Property::sometimes("it is ended for want of memory", |_, it: &State| {
                it.step == Step::Over && it.arrival == ArrivalState::Bereft
            }),
            Property::always("what has run there does not go on here", |_, it: &State| {
                !(it.ran_there && matches!(it.source, Some(Phase::Running | Phase::Sending)))
            }),
            Property::always(
                "nothing is lost unless its process is killed",
                |_, it: &State| {
                    let lives = it.source.is_some()
                        || matches!(
                            it.destination,
                            Some(Phase::Running | Phase::Received | Phase::Pulling)
                        );
                    lives || it.kills > 0
                },
            ),
            Property::always("it is forgotten when it is there", |_, it: &State| {
                it.record != Record::Forgotten || was_there(it.arrival)
            }),
            Property::always("when it is over, one of them has it", |_, it: &State| {
                it.step != Step::Over || (it.record == Record::Forgotten) == was_there(it.arrival)
            }),
            Property::always(
                "when it is over, nothing is left that waits",
                |_, it: &State| {
                    it.step != Step::Over || matches!(it.destination, None | Some(Phase::Running))
                },
            ),
            Property::sometimes("it moves", |_, it: &State| {
                it.step == Step::Over && it.record == Record::Forgotten && it.kills == 0
            }),
            Property::sometimes(
                "it moves although its source was killed",
                |_, it: &State| it.step == Step::Over && it.record == Record::Forgotten && it.lost,
            ),
            Property::sometimes("it stays", |_, it: &State| {
                it.step == Step::Over && it.record == Record::Here && it.kills == 0
            }),
            // Only if the destination was killed when it had it, or may have.
            Property::always("doubt has a reason", |_, it: &State| {
                it.arrival != ArrivalState::Lost || it.kills > 0
            }),
        ]
    }
}

/// From every state the move can come to its end, if nothing more breaks, unless only the user
/// can tell where it is.
fn comes_to_its_end(from: &State) -> bool {
    let mut it = from.clone();
    for _ in 0..40 {
        if it.step == Step::Over {
            return true;
        }
        processes(&mut it);
        look(&mut it);
        source(&mut it, true, false);
    }
    it.arrival == ArrivalState::Lost
}

#[test]
fn every_order_of_agents_processes_and_faults() {
    let checker = Moves.checker().spawn_bfs().join();
    checker.assert_properties();
    assert!(
        checker.unique_state_count() > 300,
        "{}",
        checker.unique_state_count()
    );
}

#[test]
fn every_move_can_end() {
    let mut seen = std::collections::HashSet::new();
    let mut open = Moves.init_states();
    while let Some(it) = open.pop() {
        if !seen.insert(it.clone()) {
            continue;
        }
        assert!(comes_to_its_end(&it), "{it:?}");
        open.extend(Moves.next_steps(&it).into_iter().map(|(_, after)| after));
    }
    assert!(seen.len() > 300, "{}", seen.len());
}
