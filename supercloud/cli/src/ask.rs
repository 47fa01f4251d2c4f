//! Asks this node's agent, or by it another one.

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use supercloud_api::{Error, Vm};
use supercloud_node::client::{self, Agent};
use supercloud_node::config;

/// Whom to ask.
#[derive(Clone, Debug)]
pub struct To {
    /// The node; this one if none.
    pub node: Option<String>,
}

impl To {
    /// A connection.
    pub async fn agent(&self) -> Result<Agent, Error> {
        let socket = config::socket(&config::default_run()?);
        Agent::here(&socket, self.node.clone()).await
    }

    /// Asks for something.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, Error> {
        let mut agent = self.agent().await?;
        agent.ask(method, path, body, client::LONG).await
    }

    /// Looks at something.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.ask(Method::GET, path, None::<&()>).await
    }

    /// The node that has a VM: the one that was named, or the one that says so.
    pub async fn of_vm(&self, name: &str) -> Result<Self, Error> {
        supercloud_api::name("a VM", name)?;
        if self.node.is_some() {
            return Ok(self.clone());
        }
        let vm: Vm = self.get(&format!("/v1/vms/{name}?all=true")).await?;
        Ok(Self {
            node: Some(vm.node),
        })
    }
}
