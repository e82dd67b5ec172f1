//! The world as a model for stateright.

use std::hash::{Hash, Hasher};

use stateright::{Model, Property};

use crate::world::{Budget, Plant, Step, World};

/// One configuration.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// What may happen.
    pub budget: Budget,
    /// A bug in it.
    pub plant: Option<Plant>,
}

/// A state: how it came about, and what it is.
#[derive(Clone, Debug)]
pub struct Node {
    path: Vec<Step>,
    print: u64,
    broken: Option<String>,
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Hash for Node {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

/// While it lives, this thread has the bug.
struct Planted;

impl Drop for Planted {
    fn drop(&mut self) {
        #[cfg(feature = "planted-bugs")]
        endio_types::planted::plant(None);
    }
}

impl Protocol {
    /// The checker calls from threads of its own.
    fn planted(&self) -> Planted {
        #[cfg(feature = "planted-bugs")]
        match self.plant {
            Some(Plant::Pure(bug)) => endio_types::planted::plant([bug]),
            Some(Plant::Both(one, other)) => endio_types::planted::plant([one, other]),
            _ => {}
        }
        Planted
    }

    fn replay(&self, path: &[Step]) -> World {
        let mut world = World::new(self.budget, self.plant);
        path.iter().for_each(|step| world.step(*step));
        world
    }

    fn node(&self, path: Vec<Step>, world: &World) -> Node {
        Node { path, print: world.fingerprint(), broken: world.broken().map(str::to_owned) }
    }
}

impl Model for Protocol {
    type State = Node;
    type Action = Step;

    fn init_states(&self) -> Vec<Node> {
        let _planted = self.planted();
        vec![self.node(Vec::new(), &self.replay(&[]))]
    }

    fn actions(&self, state: &Node, actions: &mut Vec<Step>) {
        let _planted = self.planted();
        if state.broken.is_none() {
            actions.extend(self.replay(&state.path).possible());
        }
    }

    fn next_state(&self, last: &Node, step: Step) -> Option<Node> {
        let _planted = self.planted();
        let mut world = self.replay(&last.path);
        world.step(step);
        let mut path = last.path.clone();
        path.push(step);
        let node = self.node(path, &world);
        (node.print != last.print).then_some(node)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("nothing is broken on the way", |_, state| {
                state.broken.is_none()
            }),
            Property::<Self>::always(
                "every io_end ends and every block comes back",
                |this, state| {
                    let _planted = this.planted();
                    state.broken.is_some() || this.replay(&state.path).heals()
                },
            ),
            Property::<Self>::sometimes("a write converts", |this, state| {
                let _planted = this.planted();
                this.replay(&state.path).converted() > 0
            }),
            Property::<Self>::sometimes("a block is handed out again", |this, state| {
                let _planted = this.planted();
                this.replay(&state.path).reuses() > 0
            }),
        ]
    }
}
