//! From a store to its state.

use super::{
    ChangeState, ClientState, ConnectionState, EventState, NodeState, RemovedState, SeenState,
    StoreState, TransactionState, VERSION, WatchState, WrittenNode, WrittenState,
};
use crate::node::{Node, Perm};
use crate::store::Client;
use crate::transaction::Transaction;
use crate::watch::Change;
use crate::{Connection, Path, Store};

impl Store {
    /// The whole store as plain data. Nothing changes by it, and a store that is
    /// restored from it answers every request as this one would.
    #[must_use]
    pub fn save(&self) -> StoreState {
        let nodes = self.tree.nodes.iter().map(|(path, node)| NodeState {
            path: path.to_string(),
            value: node.value.clone(),
            perms: perms(&node.perms),
            generation: node.generation,
        });
        let clients = self
            .clients
            .iter()
            .map(|(id, client)| save_client(id.number(), client));
        StoreState {
            version: VERSION,
            generation: self.tree.generation,
            nodes: nodes.collect(),
            next_client: self.next_client,
            clients: clients.collect(),
        }
    }
}

impl Connection {
    /// This end of the wire as plain data. It belongs to the state of its store that
    /// is saved at the same time.
    #[must_use]
    pub fn save(&self) -> ConnectionState {
        ConnectionState {
            version: VERSION,
            client: self.conn.number(),
            input: self.input.clone(),
            output: self.output.iter().copied().collect(),
        }
    }
}

fn perms(list: &[Perm]) -> Vec<String> {
    list.iter().map(|perm| perm.text()).collect()
}

fn save_client(number: u32, client: &Client) -> ClientState {
    let watches = client.watches.list.iter().map(|watch| WatchState {
        path: watch.watched.text(client.domain),
        token: watch.token.clone(),
        depth: watch.depth,
    });
    let events = client.watches.events.iter().map(|event| EventState {
        path: event.path.clone(),
        token: event.token.clone(),
    });
    let transactions = client
        .transactions
        .iter()
        .map(|(id, transaction)| save_transaction(id.0, transaction));
    ClientState {
        number,
        domain: client.domain,
        watches: watches.collect(),
        events: events.collect(),
        dropped: client.watches.dropped,
        next_transaction: client.next_transaction,
        transactions: transactions.collect(),
    }
}

fn save_transaction(number: u32, transaction: &Transaction) -> TransactionState {
    let seen = transaction.seen.iter().map(|(path, generation)| SeenState {
        path: path.to_string(),
        generation: *generation,
    });
    let written = transaction.written.iter().map(save_written);
    TransactionState {
        number,
        seen: seen.collect(),
        written: written.collect(),
        changes: transaction.changes.iter().map(save_change).collect(),
    }
}

fn save_written((path, node): (&Path, &Option<Node>)) -> WrittenState {
    WrittenState {
        path: path.to_string(),
        node: node.as_ref().map(|node| WrittenNode {
            value: node.value.clone(),
            perms: perms(&node.perms),
            children: node.children.iter().map(ToString::to_string).collect(),
            generation: node.generation,
        }),
    }
}

fn save_change(change: &Change) -> ChangeState {
    let removed = change.removed.as_ref().map(|nodes| {
        let one = |(path, list): (&Path, &Vec<Perm>)| RemovedState {
            path: path.to_string(),
            perms: perms(list),
        };
        nodes.iter().map(one).collect()
    });
    ChangeState {
        path: change.path.to_string(),
        perms: change.perms.iter().map(|list| perms(list)).collect(),
        removed,
    }
}
