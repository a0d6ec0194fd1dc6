//! The state machine against a model of the world: whatever crashes, fails or keeps silent, in whatever order, a
//! release ends complete or undone, and no port moves before its time.

use super::*;
use proptest::prelude::*;

/// What may befall a release in one turn.
#[derive(Debug, Clone, Copy)]
enum Turn {
    /// The verifier does what it decided and writes it down.
    Work,
    /// The effect happens, the answer is lost, the verifier dies before it writes.
    CrashAfterEffect,
    /// The verifier dies before the effect.
    CrashBeforeEffect,
    /// The peer does not answer; nothing happened there.
    NoAnswer,
    /// The peer acted, but its answer was lost; the verifier lives.
    AnswerLost,
    /// The peer refuses for good.
    Refusal,
    /// The agent says `ready`.
    AgentReady,
    /// The answer to `ready` leaves.
    AnswerLeaves,
    /// The agent asks for its grant.
    AgentGrant,
    /// The agent says that it hands over.
    AgentHandover,
    /// The node is accepted anew.
    Supersede,
    /// Time passes.
    Pass(i64),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        6 => Just(Turn::Work),
        1 => Just(Turn::CrashAfterEffect),
        1 => Just(Turn::CrashBeforeEffect),
        1 => Just(Turn::NoAnswer),
        1 => Just(Turn::AnswerLost),
        1 => Just(Turn::Refusal),
        3 => Just(Turn::AgentReady),
        3 => Just(Turn::AnswerLeaves),
        3 => Just(Turn::AgentGrant),
        2 => Just(Turn::AgentHandover),
        1 => Just(Turn::Supersede),
        2 => (1_i64..200_000).prop_map(Turn::Pass),
    ]
}

/// The verifier with its journal, and what isolation and imaging have on record.
struct World {
    now_ms: i64,
    position: Position,
    presence: Presence,
    history: Vec<ReleaseStep>,
    export_open: bool,
    port_open: bool,
    grants_given: u32,
}

impl World {
    fn new() -> Self {
        Self {
            now_ms: 0,
            position: Position { step: ReleaseStep::Admitted, step_at_ms: 0, result_expires_at_ms: 400_000 },
            presence: Presence {
                resumed_at_ms: 0,
                ready_answer: ReadyAnswer::NotAsked,
                predecessor_open: false,
                given_up: None,
            },
            history: vec![ReleaseStep::Admitted],
            export_open: false,
            port_open: false,
            grants_given: 0,
        }
    }

    fn write(&mut self, event: ReleaseEvent) {
        let step = self.position.step.next(event).expect("the machine decided on an event that it refuses");
        if step != self.position.step {
            self.position = Position { step, step_at_ms: self.now_ms, ..self.position };
            self.history.push(step);
        }
    }

    fn action(&self) -> Action {
        decide(&self.position, &self.presence, &ReleaseTimeouts::default(), self.now_ms)
    }

    fn restart(&mut self) {
        self.presence = Presence {
            resumed_at_ms: self.now_ms,
            ready_answer: ReadyAnswer::NotAsked,
            predecessor_open: false,
            given_up: None,
        };
    }

    fn effect(&mut self, action: Action) -> Option<ReleaseEvent> {
        match action {
            Action::Export => {
                self.export_open = true;
                Some(ReleaseEvent::ExportMade)
            }
            Action::Move => {
                for step in [ReleaseStep::Admitted, ReleaseStep::Exported, ReleaseStep::Ready] {
                    assert!(self.history.contains(&step), "port moved without {step} in the journal");
                }
                assert!(self.export_open, "port moved without an export");
                assert!(self.now_ms < self.position.result_expires_at_ms, "port moved on an expired result");
                self.port_open = true;
                Some(ReleaseEvent::PortMoved)
            }
            Action::Unwind => {
                self.port_open = false;
                self.export_open = false;
                Some(ReleaseEvent::Undone)
            }
            Action::GiveUp(_) => Some(ReleaseEvent::Failed),
            Action::Wait { .. } | Action::Finish => None,
        }
    }

    fn take(&mut self, turn: Turn) {
        let action = self.action();
        match turn {
            Turn::Work => {
                if let Some(event) = self.effect(action) {
                    self.write(event);
                }
            }
            Turn::CrashAfterEffect => {
                self.effect(action);
                self.restart();
            }
            Turn::CrashBeforeEffect => self.restart(),
            Turn::AnswerLost => {
                self.effect(action);
            }
            Turn::NoAnswer => {}
            Turn::Refusal => match action {
                Action::Export | Action::Move => self.write(ReleaseEvent::Failed),
                Action::Unwind | Action::Wait { .. } | Action::GiveUp(_) | Action::Finish => {}
            },
            Turn::AgentReady => {
                if self.position.step.next(ReleaseEvent::AgentReady).is_ok() {
                    self.write(ReleaseEvent::AgentReady);
                    self.presence.ready_answer = ReadyAnswer::Leaving;
                }
            }
            Turn::AnswerLeaves => {
                if self.presence.ready_answer == ReadyAnswer::Leaving {
                    self.presence.ready_answer = ReadyAnswer::Left { at_ms: self.now_ms };
                }
            }
            Turn::AgentGrant => {
                if self.position.step.next(ReleaseEvent::GrantFetched).is_ok() {
                    assert!(self.port_open, "grant given out before the port was moved");
                    self.write(ReleaseEvent::GrantFetched);
                    self.grants_given += 1;
                }
            }
            Turn::AgentHandover => {
                if self.position.step.next(ReleaseEvent::AgentHandedOver).is_ok() {
                    self.write(ReleaseEvent::AgentHandedOver);
                }
            }
            Turn::Supersede => self.presence.given_up = Some(Reason::Superseded),
            Turn::Pass(ms) => self.now_ms += ms,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_release_ends_complete_or_undone(turns in proptest::collection::vec(turn(), 0..60)) {
        let mut world = World::new();
        for turn in turns {
            world.take(turn);
        }
        // The agent falls silent and the peers answer again: only deadlines move it on now.
        let mut turns = 0;
        while !world.position.step.is_finished() {
            turns += 1;
            prop_assert!(turns < 20, "stuck in {}", world.position.step);
            match world.action() {
                Action::Wait { until_ms } => {
                    prop_assert!(until_ms > world.now_ms, "waits for a moment that has passed");
                    world.now_ms = until_ms;
                }
                Action::Export | Action::Move | Action::Unwind | Action::GiveUp(_) => world.take(Turn::Work),
                Action::Finish => prop_assert!(false, "finished in {}", world.position.step),
            }
        }
        match world.position.step {
            ReleaseStep::HandedOver => {
                prop_assert!(world.port_open && world.export_open && world.grants_given > 0);
            }
            ReleaseStep::Unwound => prop_assert!(!world.port_open && !world.export_open),
            other => prop_assert!(false, "{other} is no end"),
        }
    }
}

/// The property above would hold of a machine that always undoes; this one also completes, with the same model.
#[test]
fn the_model_sees_both_ends() {
    let mut world = World::new();
    for turn in [
        Turn::CrashAfterEffect,
        Turn::Work,
        Turn::AgentReady,
        Turn::AnswerLost,
        Turn::AnswerLeaves,
        Turn::Pass(50),
        Turn::CrashAfterEffect,
        Turn::Pass(10_000),
        Turn::Work,
        Turn::AgentGrant,
        Turn::AgentHandover,
    ] {
        world.take(turn);
    }
    assert_eq!(world.position.step, ReleaseStep::HandedOver);
    assert!(world.port_open && world.export_open);
}

#[test]
fn the_straight_way_through() {
    use ReleaseEvent::{AgentHandedOver, AgentReady, ExportMade, GrantFetched, PortMoved};
    let mut step = ReleaseStep::Admitted;
    for (event, after) in [
        (ExportMade, ReleaseStep::Exported),
        (AgentReady, ReleaseStep::Ready),
        (PortMoved, ReleaseStep::Moved),
        (GrantFetched, ReleaseStep::Granted),
        (AgentHandedOver, ReleaseStep::HandedOver),
    ] {
        step = step.next(event).unwrap();
        assert_eq!(step, after);
    }
}

#[test]
fn what_is_over_stays_over() {
    assert!(ReleaseStep::HandedOver.next(ReleaseEvent::Failed).is_err());
    assert!(ReleaseStep::Unwound.next(ReleaseEvent::PortMoved).is_err());
    assert_eq!(ReleaseStep::Unwinding.next(ReleaseEvent::Failed), Ok(ReleaseStep::Unwinding));
}

#[test]
fn the_move_waits_for_the_answer_and_no_longer() {
    let timeouts = ReleaseTimeouts::default();
    let position = Position { step: ReleaseStep::Ready, step_at_ms: 1_000, result_expires_at_ms: 1_000_000 };
    let presence =
        |ready_answer| Presence { resumed_at_ms: 900, ready_answer, predecessor_open: false, given_up: None };
    let at = |answer, now_ms| decide(&position, &presence(answer), &timeouts, now_ms);
    assert_eq!(at(ReadyAnswer::Leaving, 1_500), Action::Wait { until_ms: 61_000 });
    assert_eq!(at(ReadyAnswer::Left { at_ms: 1_010 }, 1_059), Action::Wait { until_ms: 1_060 });
    assert_eq!(at(ReadyAnswer::Left { at_ms: 1_010 }, 1_060), Action::Move);
    assert_eq!(at(ReadyAnswer::NotAsked, 10_899), Action::Wait { until_ms: 10_900 });
    assert_eq!(at(ReadyAnswer::NotAsked, 10_900), Action::Move);
    assert_eq!(at(ReadyAnswer::NotAsked, 61_000), Action::GiveUp(Reason::MoveTimeout));
}

#[test]
fn a_successor_waits_until_its_predecessor_is_undone() {
    let position = Position { step: ReleaseStep::Admitted, step_at_ms: 0, result_expires_at_ms: 1_000_000 };
    let presence =
        Presence { resumed_at_ms: 0, ready_answer: ReadyAnswer::NotAsked, predecessor_open: true, given_up: None };
    let timeouts = ReleaseTimeouts::default();
    assert_eq!(decide(&position, &presence, &timeouts, 1), Action::Wait { until_ms: 60_000 });
    assert_eq!(decide(&position, &presence, &timeouts, 60_000), Action::GiveUp(Reason::ExportTimeout));
}

#[test]
fn the_drawing_names_every_step() {
    let drawing = include_str!("journal.rs");
    let (drawing, _) = drawing.split_once("use serde").unwrap();
    for step in ReleaseStep::ALL {
        assert!(drawing.contains(&format!("**{step:?}**")), "{step:?} has no sentence in the drawing");
        assert_eq!(step.as_str().parse::<ReleaseStep>(), Ok(step));
        assert_eq!(serde_json::to_string(&step).unwrap(), format!("\"{step}\""));
    }
}
