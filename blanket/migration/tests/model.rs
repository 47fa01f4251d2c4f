//! Every order of events of a handover: lost links and messages, both processes ending,
//! the user's cancelling, starts that fail, with all of the memory and with a part of it that
//! follows. The two sides are the code that runs.

use blanket_migration::handover::{Destination, DestinationDoes, Memory, Source, SourceDoes};
use blanket_migration::message::Message;
use stateright::{Checker, Model, Property};

/// Both sides, and what is between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// `None`: its process has ended, and the VM there with it.
    source: Option<Source>,
    destination: Option<Destination>,
    link: Option<Link>,
    runs_here: bool,
    runs_there: bool,
    /// A part of its memory follows.
    memory: Memory,
    /// All of it is there.
    whole_there: bool,
    ended_here: bool,
    /// Links that were made, of as many as the model tries.
    links: u8,
    cancelled: bool,
}

/// What is on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Link {
    to_destination: Vec<Message>,
    to_source: Vec<Message>,
    /// The whole VM is.
    whole: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    AllSent,
    AllReceived,
    DestinationHears,
    SourceHears,
    Started,
    /// Pages come, until none is missing.
    Pulled,
    /// Somebody has seen the source end, and says so.
    Mourned,
    /// It cannot be received or started, or is killed.
    GivesUp,
    LinkLost,
    Connects,
    Cancels,
    /// Its user knows that the source has ended.
    Claims,
    SourceDies,
    DestinationDies,
}

struct Handover {
    links: u8,
    deaths: bool,
}

impl State {
    fn source_does(&mut self, does: SourceDoes) {
        match does {
            SourceDoes::Waits | SourceDoes::Asks => {}
            SourceDoes::Says(message) => {
                if let Some(link) = &mut self.link {
                    link.to_destination.push(message);
                }
            }
            SourceDoes::GoesOn => self.runs_here = true,
            SourceDoes::Ends => self.ended_here = true,
        }
    }

    fn destination_does(&mut self, does: DestinationDoes) {
        match does {
            DestinationDoes::Says(message) => {
                if let Some(link) = &mut self.link {
                    link.to_source.push(message);
                }
            }
            DestinationDoes::Stops => self.runs_there = false,
            DestinationDoes::Waits
            | DestinationDoes::Starts
            | DestinationDoes::Discards
            | DestinationDoes::Listens => {}
        }
    }

    fn loses_link(&mut self) {
        self.link = None;
        if let Some(source) = &mut self.source {
            let does = source.loses();
            self.source_does(does);
        }
        if let Some(destination) = &mut self.destination {
            let does = destination.loses();
            self.destination_does(does);
        }
    }
}

impl Model for Handover {
    type State = State;
    type Action = Event;

    fn init_states(&self) -> Vec<State> {
        let state = |memory| State {
            source: Some(Source::Copying),
            destination: Some(Destination::Receiving),
            link: Some(Link::default()),
            runs_here: true,
            runs_there: false,
            memory,
            whole_there: memory == Memory::Whole,
            ended_here: false,
            links: 1,
            cancelled: false,
        };
        vec![state(Memory::Whole), state(Memory::Apart)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Event>) {
        if let Some(link) = &state.link {
            if state.source == Some(Source::Copying) {
                actions.push(Event::AllSent);
            }
            let receiving = state.destination == Some(Destination::Receiving);
            if link.whole && receiving {
                actions.push(Event::AllReceived);
            }
            if state.destination.is_some() && !receiving && !link.to_destination.is_empty() {
                actions.push(Event::DestinationHears);
            }
            if state.source.is_some() && !link.to_source.is_empty() {
                actions.push(Event::SourceHears);
            }
            actions.push(Event::LinkLost);
        } else if state.links < self.links && state.source.is_some() && state.destination.is_some()
        {
            actions.push(Event::Connects);
        }
        if matches!(state.destination, Some(Destination::Starting(_))) {
            actions.push(Event::Started);
        }
        let serves = state.source.is_some_and(|source| source.serves());
        if state.link.is_some() && serves && state.destination == Some(Destination::Pulling) {
            actions.push(Event::Pulled);
        }
        if state.source.is_none() && state.link.is_none() && state.destination.is_some() {
            actions.push(Event::Mourned);
        }
        if matches!(
            state.destination,
            Some(Destination::Receiving | Destination::Waiting(_) | Destination::Starting(_))
        ) {
            actions.push(Event::GivesUp);
        }
        if state.source.is_some() && !state.cancelled {
            actions.push(Event::Cancels);
        }
        if state.source.is_none() && matches!(state.destination, Some(Destination::Waiting(_))) {
            actions.push(Event::Claims);
        }
        if self.deaths && state.source.is_some() {
            actions.push(Event::SourceDies);
        }
        if self.deaths && state.destination.is_some() {
            actions.push(Event::DestinationDies);
        }
    }

    fn next_state(&self, last: &State, event: Event) -> Option<State> {
        let mut state = last.clone();
        match event {
            Event::AllSent => {
                state.source.as_mut()?.sent(last.memory);
                // From here on it stands still.
                state.runs_here = false;
                state.link.as_mut()?.whole = true;
            }
            Event::AllReceived => {
                let does = state.destination.as_mut()?.received(last.memory);
                state.destination_does(does);
            }
            Event::DestinationHears => {
                let message = state.link.as_mut()?.to_destination.remove(0);
                let does = state.destination.as_mut()?.hears(message);
                state.destination_does(does);
            }
            Event::SourceHears => {
                let message = state.link.as_mut()?.to_source.remove(0);
                let does = state.source.as_mut()?.hears(message);
                state.source_does(does);
            }
            Event::Started => {
                let message = state.destination.as_mut()?.started();
                state.runs_there = state.destination != Some(Destination::Lost);
                state.destination_does(DestinationDoes::Says(message));
            }
            Event::Pulled => {
                state.whole_there = true;
                let message = state.destination.as_mut()?.pulled()?;
                state.destination_does(DestinationDoes::Says(message));
            }
            Event::Mourned => {
                let does = state.destination.as_mut()?.bereft();
                if last == &state && does == DestinationDoes::Listens {
                    return None;
                }
                state.destination_does(does);
            }
            Event::GivesUp => {
                let message = state.destination.as_mut()?.gives_up()?;
                state.destination_does(DestinationDoes::Says(message));
            }
            Event::LinkLost => state.loses_link(),
            Event::Connects => {
                let mut link = Link::default();
                link.to_destination.extend(state.source?.greets());
                link.to_source.extend(state.destination?.greets());
                state.link = Some(link);
                state.links += 1;
            }
            Event::Cancels => {
                state.cancelled = true;
                if state.source.as_mut()?.cancels() {
                    state.runs_here = true;
                    state.source_does(SourceDoes::Says(Message::Cancel));
                }
            }
            Event::Claims => {
                if !state.destination.as_mut()?.claimed() {
                    return None;
                }
            }
            Event::SourceDies => {
                state.source = None;
                state.runs_here = false;
                state.loses_link();
            }
            Event::DestinationDies => {
                state.destination = None;
                state.runs_there = false;
                state.loses_link();
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one runs", |_, state: &State| {
                !(state.runs_here && state.runs_there)
            }),
            Property::always(
                "it ends here only for one that runs there",
                |_, state: &State| {
                    let gone = state.destination.is_none();
                    let runs = matches!(state.destination, Some(Destination::Running(_)));
                    !state.ended_here || gone || runs
                },
            ),
            Property::always(
                "it ends here only when all of its memory is there",
                |_, state: &State| !state.ended_here || state.whole_there,
            ),
            Property::always(
                "what is missing there is here, where nobody runs it",
                |model: &Self, state: &State| {
                    let part = state.runs_there && !state.whole_there;
                    let dead = model.deaths && state.source.is_none();
                    !part || dead || state.source.is_some_and(|source| source.serves())
                },
            ),
            Property::always("who needs nothing more has all", |_, state: &State| {
                let runs = matches!(state.destination, Some(Destination::Running(_)));
                !runs || state.whole_there
            }),
            Property::always("it is lost only with its source", |_, state: &State| {
                state.destination != Some(Destination::Lost)
                    || state.source.is_none() && !state.whole_there && !state.runs_there
            }),
            Property::always("somebody has it", |model: &Self, state: &State| {
                let here = state.source.is_some_and(|it| it != Source::There);
                model.deaths || here || state.runs_there
            }),
            // Whoever may not be sure has a link on which the answer is coming, or none.
            Property::always("a link ends every doubt", |_, state: &State| {
                let (Some(source), Some(destination), Some(link)) =
                    (state.source, state.destination, &state.link)
                else {
                    return true;
                };
                let quiet = link.to_source.is_empty() && link.to_destination.is_empty();
                let starts = matches!(destination, Destination::Starting(_));
                let doubt = matches!(source, Source::Committed(_)) && !starts;
                let serves = source == Source::Serving && destination != Destination::Pulling;
                !(quiet && (doubt || serves))
            }),
            Property::sometimes(
                "its memory follows over a second link",
                |_, state: &State| {
                    let followed = state.memory == Memory::Apart && state.whole_there;
                    followed && state.ended_here && state.links == 2
                },
            ),
            Property::sometimes(
                "it is lost with its source",
                |model: &Self, state: &State| {
                    !model.deaths || state.destination == Some(Destination::Lost)
                },
            ),
            Property::sometimes("it survives its source", |model: &Self, state: &State| {
                !model.deaths || state.source.is_none() && state.runs_there && !state.ended_here
            }),
            Property::sometimes("it moves", |_, state: &State| {
                state.ended_here && state.runs_there
            }),
            Property::sometimes("it moves over a second link", |_, state: &State| {
                state.ended_here && state.runs_there && state.links == 2
            }),
            Property::sometimes("it comes back after GO was said", |_, state: &State| {
                let gone = state.destination == Some(Destination::Gone);
                state.runs_here && gone && state.links == 2 && !state.cancelled
            }),
        ]
    }
}

fn check(model: Handover) {
    let checker = model.checker().spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.unique_state_count() > 100);
}

#[test]
fn lost_links() {
    check(Handover {
        links: 4,
        deaths: false,
    });
}

#[test]
fn lost_links_and_processes() {
    check(Handover {
        links: 3,
        deaths: true,
    });
}
