//! What is to be done next, of what is remembered and what is seen. Nothing here does
//! anything: it is tried with every state there is.

use supercloud_api::{ArrivalState, Life, Place, Step};

use crate::blanket::Phase;

/// What is to be done with a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Nothing.
    Nothing,
    /// Start its process.
    Start,
    /// Note that it runs.
    Runs,
    /// Note that it does not, and has ended by itself.
    Ended,
    /// Note that it does not, as it was to be.
    Stopped,
    /// Stop its guest.
    Stop,
    /// End its process.
    Kill,
    /// Remove what it has here, and its record.
    Remove,
    /// Note that it has come.
    Arrived,
    /// Note that the process that it was to come to is gone.
    Lost,
    /// A part of its memory is lost: end its process, and note that.
    Bereave,
}

/// What is to be done with a VM of which this is remembered, and whose process does that;
/// none if there is no process.
#[must_use]
pub fn deed(life: Life, place: &Place, phase: Option<Phase>) -> Deed {
    // A process that has done its work ends by itself.
    let phase = phase.filter(|phase| *phase != Phase::Ended);
    match (place, life, phase) {
        // The move that it is in knows better.
        (Place::Leaving { .. }, _, _) => Deed::Nothing,
        (
            Place::Coming { .. },
            _,
            Some(
                Phase::Running
                | Phase::Sending
                | Phase::Standing
                | Phase::Doubt
                | Phase::Serving
                | Phase::Cut
                | Phase::Pulling
                | Phase::Lost,
            ),
        ) => Deed::Arrived,
        (Place::Coming { .. }, _, Some(_)) => Deed::Nothing,
        (Place::Coming { .. }, _, None) => Deed::Lost,
        (Place::Here, Life::Starting | Life::Running | Life::Stopped, Some(Phase::Lost)) => {
            Deed::Bereave
        }
        (Place::Here, Life::Stopping, Some(Phase::Lost)) => Deed::Kill,
        (Place::Here, Life::Starting, None) => Deed::Start,
        (Place::Here, Life::Starting, Some(Phase::Starting)) => Deed::Nothing,
        // Started by an agent that was killed before it had noted it.
        (Place::Here, Life::Starting | Life::Stopped, Some(_)) => Deed::Runs,
        (Place::Here, Life::Running, None) => Deed::Ended,
        (Place::Here, Life::Running, Some(_)) | (Place::Here, Life::Stopped, None) => Deed::Nothing,
        (Place::Here, Life::Stopping, None) => Deed::Stopped,
        (Place::Here, Life::Stopping, Some(_)) => Deed::Stop,
        (Place::Here, Life::Removing, None) => Deed::Remove,
        (Place::Here, Life::Removing, Some(_)) => Deed::Kill,
    }
}

/// What is known of a move at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// Where it is.
    pub step: Step,
    /// It is not wanted any more.
    pub cancelled: bool,
    /// `blanket migrate` was begun, or may have been.
    pub begun: bool,
    /// `blanket migrate` has not ended, whichever agent has begun it.
    pub mover: bool,
    /// By its user's word the VM is here.
    pub kept: bool,
    /// What the VM's process here does; none if there is none.
    pub source: Option<Phase>,
    /// What became of it at the destination; none if that does not answer, or was not asked.
    pub destination: Option<ArrivalState>,
}

/// What is to be done for a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// Have the destination make itself ready.
    Prepare,
    /// Begin to send.
    Send,
    /// It is being sent: look on.
    Follow,
    /// The VM stands still: ask the destination's process what became of it.
    AskAgain,
    /// It never ran there, and never will: let it go on here.
    KeepHere,
    /// Its process here has ended, and all of it is there: let it go on there.
    ClaimThere,
    /// It ran there and has ended, or been ended: what its process here still has is of no use.
    Release,
    /// It runs there, and a part of its memory was with its process here, which has ended: have it
    /// ended there.
    Bereave,
    /// It stays here: the destination is to clear away. The move has failed.
    Stays,
    /// It has gone: the destination is to say that it has it.
    Gone,
    /// The destination has it: forget it here.
    Finish,
    /// Have the destination clear away.
    Clear,
    /// Look again in a while.
    Wait,
    /// As `Wait`, and nobody but the user may be able to tell where it is.
    Doubt,
    /// Nothing is left to do.
    Over,
}

/// What is to be done for a move of which this is known.
///
/// The rules are those of the VM's own protocol (`docs/migration.md`): while its process
/// here runs it, it is here, and stays if it was not given; while it stands still in doubt,
/// only the destination knows; and once its process here has ended, it is nowhere but there.
#[must_use]
pub fn next(view: &View) -> Next {
    use ArrivalState as There;
    let source = view.source.filter(|phase| *phase != Phase::Ended);
    match view.step {
        Step::Preparing if view.cancelled => Next::Stays,
        Step::Preparing => match source {
            Some(Phase::Running) => Next::Prepare,
            _ => Next::Stays,
        },
        Step::Moving => match (source, view.destination) {
            (Some(Phase::Sending | Phase::Standing | Phase::Serving), _) => Next::Follow,
            (Some(Phase::Doubt | Phase::Cut), Some(There::Ended | There::Bereft)) => Next::Release,
            (Some(Phase::Doubt), Some(There::Refused)) => Next::KeepHere,
            // Whoever sends asks by itself for a while.
            (Some(Phase::Doubt | Phase::Cut), _) if view.mover => Next::Wait,
            (Some(Phase::Doubt | Phase::Cut), _) => Next::AskAgain,
            // It is about to begin, or to end.
            (Some(_), _) if view.mover => Next::Wait,
            (Some(_), _) if view.begun || view.cancelled => Next::Stays,
            (Some(_), _) => Next::Send,
            // It was never given to anybody: it has ended by itself.
            (None, _) if !view.begun => Next::Stays,
            (None, Some(There::Here | There::Ended | There::Bereft)) => Next::Gone,
            // Whoever sends ends with it.
            (None, Some(There::Following)) if view.mover => Next::Wait,
            (None, Some(There::Following)) => Next::Bereave,
            (None, Some(There::Received)) => Next::ClaimThere,
            // It was not all there, or was never wanted.
            (None, Some(There::Waiting | There::Refused | There::Unknown)) => Next::Stays,
            (None, Some(There::Lost) | None) if view.kept => Next::Stays,
            (None, Some(There::Lost) | None) => Next::Doubt,
        },
        Step::Leaving => match (source, view.destination) {
            (None, Some(There::Here | There::Ended | There::Bereft)) => Next::Finish,
            (None, Some(There::Following)) => Next::Bereave,
            (None, Some(There::Received)) => Next::ClaimThere,
            (None, Some(There::Lost | There::Refused | There::Unknown) | None) if view.kept => {
                Next::Stays
            }
            // Also a node that was removed before it said that it has it.
            (None, Some(There::Lost | There::Refused | There::Unknown)) => Next::Doubt,
            // Its process here goes when it has given its last answers.
            _ => Next::Wait,
        },
        Step::Clearing => match view.destination {
            Some(There::Refused | There::Unknown) => Next::Over,
            // It came at the last moment, after all.
            Some(There::Here | There::Following | There::Ended | There::Bereft)
                if source.is_none() =>
            {
                Next::Gone
            }
            None => Next::Clear,
            Some(_) => Next::Clear,
        },
        Step::Over => Next::Over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 5] = [
        Step::Preparing,
        Step::Moving,
        Step::Leaving,
        Step::Clearing,
        Step::Over,
    ];
    const THERE: [Option<ArrivalState>; 10] = [
        None,
        Some(ArrivalState::Unknown),
        Some(ArrivalState::Waiting),
        Some(ArrivalState::Received),
        Some(ArrivalState::Here),
        Some(ArrivalState::Following),
        Some(ArrivalState::Ended),
        Some(ArrivalState::Bereft),
        Some(ArrivalState::Refused),
        Some(ArrivalState::Lost),
    ];

    fn phases() -> impl Iterator<Item = Option<Phase>> {
        std::iter::once(None).chain(Phase::ALL.map(Some))
    }

    fn views() -> Vec<View> {
        let mut all = Vec::new();
        for step in STEPS {
            for cancelled in [false, true] {
                for begun in [false, true] {
                    for (source, kept) in phases().flat_map(|it| [(it, false), (it, true)]) {
                        for destination in THERE {
                            for mover in [false, true] {
                                all.push(View {
                                    step,
                                    cancelled,
                                    begun,
                                    mover,
                                    kept,
                                    source,
                                    destination,
                                });
                            }
                        }
                    }
                }
            }
        }
        all
    }

    /// A VM is forgotten here only if there is no process here, and the destination has it.
    #[test]
    fn nothing_is_forgotten_that_is_not_elsewhere() {
        for view in views() {
            if next(&view) == Next::Finish {
                assert!(matches!(view.source, None | Some(Phase::Ended)), "{view:?}");
                assert!(
                    matches!(
                        view.destination,
                        Some(ArrivalState::Here | ArrivalState::Ended | ArrivalState::Bereft)
                    ),
                    "{view:?}"
                );
            }
        }
    }

    /// What a process has of a VM's memory is thrown away only if nobody can need it any more, and
    /// a VM is ended for want of its memory only if nobody has that.
    #[test]
    fn memory_is_given_up_when_nobody_needs_it() {
        for view in views() {
            match next(&view) {
                Next::Release => assert!(
                    matches!(
                        view.destination,
                        Some(ArrivalState::Ended | ArrivalState::Bereft)
                    ),
                    "{view:?}"
                ),
                Next::Bereave => {
                    assert!(matches!(view.source, None | Some(Phase::Ended)), "{view:?}");
                    assert_eq!(view.destination, Some(ArrivalState::Following), "{view:?}");
                    assert!(!view.mover || view.step != Step::Moving, "{view:?}");
                }
                _ => {}
            }
        }
    }

    /// Nobody lets a VM go on at one side unless it cannot run at the other.
    #[test]
    fn nothing_goes_on_at_two_sides() {
        for view in views() {
            match next(&view) {
                Next::ClaimThere => {
                    assert!(matches!(view.source, None | Some(Phase::Ended)), "{view:?}");
                }
                Next::KeepHere => {
                    assert_eq!(view.destination, Some(ArrivalState::Refused), "{view:?}");
                }
                // A second migration of one that is in doubt would be another one.
                Next::Send => assert!(!view.begun && !view.mover, "{view:?}"),
                _ => {}
            }
        }
    }

    /// A move comes to its end, whatever is seen, if the destination answers and neither
    /// side is in doubt.
    #[test]
    fn deeds_are_what_the_record_says() {
        let leaving = Place::Leaving {
            operation: "o".into(),
            to: "b".into(),
        };
        let coming = Place::Coming {
            operation: "o".into(),
            from: "a".into(),
        };
        let lives = [
            Life::Starting,
            Life::Running,
            Life::Stopping,
            Life::Stopped,
            Life::Removing,
        ];
        for life in lives {
            for phase in phases() {
                // One that changes hands is never started, stopped or removed by its record.
                assert_eq!(deed(life, &leaving, phase), Deed::Nothing);
                assert!(matches!(
                    deed(life, &coming, phase),
                    Deed::Nothing | Deed::Arrived | Deed::Lost
                ));
                let does = deed(life, &Place::Here, phase);
                if does == Deed::Start {
                    assert!(
                        matches!(phase, None | Some(Phase::Ended)),
                        "{life:?} {phase:?}"
                    );
                    assert_eq!(life, Life::Starting);
                }
                if does == Deed::Remove {
                    assert!(
                        matches!(phase, None | Some(Phase::Ended)),
                        "{life:?} {phase:?}"
                    );
                }
            }
        }
    }
}
