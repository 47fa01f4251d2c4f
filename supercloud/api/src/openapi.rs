//! The OpenAPI document, made of [`ROUTES`] and the types.

use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema};

use crate::{Door, ROUTES, Route};

fn add<T: ToSchema>(to: &mut Map<String, Value>) {
    let mut found = vec![(T::name().into_owned(), <T as PartialSchema>::schema())];
    T::schemas(&mut found);
    for (name, schema) in found {
        // A type that cannot be written down is missed by the test below.
        if let Ok(value) = serde_json::to_value(schema) {
            to.insert(name, value);
        }
    }
}

fn schemas() -> Map<String, Value> {
    let mut all = Map::new();
    add::<crate::Error>(&mut all);
    add::<crate::NodeStatus>(&mut all);
    add::<crate::Node>(&mut all);
    add::<crate::Remove>(&mut all);
    add::<crate::Members>(&mut all);
    add::<crate::NewToken>(&mut all);
    add::<crate::TokenText>(&mut all);
    add::<crate::JoinRequest>(&mut all);
    add::<crate::JoinAnswer>(&mut all);
    add::<crate::JoinCluster>(&mut all);
    add::<crate::Drain>(&mut all);
    add::<crate::Operation>(&mut all);
    add::<crate::Finding>(&mut all);
    add::<crate::NodeCpu>(&mut all);
    add::<crate::Vm>(&mut all);
    add::<crate::VmSpec>(&mut all);
    add::<crate::Stop>(&mut all);
    add::<crate::Migrate>(&mut all);
    add::<crate::Keep>(&mut all);
    add::<crate::Image>(&mut all);
    add::<crate::AddImage>(&mut all);
    add::<crate::Prepare>(&mut all);
    add::<crate::Prepared>(&mut all);
    add::<crate::Arrival>(&mut all);
    add::<crate::NewNet>(&mut all);
    add::<crate::Nets>(&mut all);
    add::<crate::NewNetAddress>(&mut all);
    add::<crate::NetMoved>(&mut all);
    add::<crate::Snapshot>(&mut all);
    add::<crate::TakeSnapshot>(&mut all);
    add::<crate::Restore>(&mut all);
    add::<crate::CloneVm>(&mut all);
    add::<crate::ExportTo>(&mut all);
    add::<crate::ImportFrom>(&mut all);
    add::<crate::Event>(&mut all);
    all
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// The media type and schema of an answer.
fn answer(response: &str) -> Value {
    let of_json = |schema: Value| json!({ "application/json": { "schema": schema } });
    if let Some(name) = response
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
    {
        of_json(json!({ "type": "array", "items": reference(name) }))
    } else if response.contains('/') {
        json!({ response: {} })
    } else {
        of_json(reference(response))
    }
}

fn operation(route: &Route) -> Value {
    let names = route.path.split('/').filter_map(|part| {
        let name = part.strip_prefix('{')?.strip_suffix('}')?;
        Some(
            json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }),
        )
    });
    let mut parameters: Vec<Value> = names.collect();
    if route.door != Door::Anyone {
        parameters.push(json!({
            "name": crate::NODE_HEADER,
            "in": "header",
            "required": false,
            "description": "the node that is to answer; at a node's own socket only",
            "schema": { "type": "string" },
        }));
    }
    let mut all = json!({
        "summary": route.what,
        "x-door": match route.door {
            Door::Local => "local",
            Door::Member => "member",
            Door::Anyone => "anyone",
        },
        "parameters": parameters,
        "responses": {
            "200": { "description": "done", "content": answer(route.response) },
            "default": { "description": "an error", "content": answer("Error") },
        },
    });
    if let (Some(name), Some(all)) = (route.request, all.as_object_mut()) {
        let content = json!({ "application/json": { "schema": reference(name) } });
        all.insert(
            "requestBody".into(),
            json!({ "required": true, "content": content }),
        );
    }
    all
}

/// The document.
#[must_use]
pub fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let path = paths
            .entry(route.path)
            .or_insert_with(|| Value::Object(Map::new()));
        if let Some(path) = path.as_object_mut() {
            path.insert(route.method.word().to_lowercase(), operation(route));
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Supercloud node",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0 OR MIT" },
        },
        "paths": paths,
        "components": { "schemas": schemas() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is referred to.
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(all) => {
                if let Some(Value::String(to)) = all.get("$ref") {
                    found.push(to.clone());
                }
                all.values().for_each(|value| references(value, found));
            }
            Value::Array(all) => all.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn nothing_is_referred_to_that_is_not_there() {
        let document = document();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > ROUTES.len());
        for to in found {
            let path = to.strip_prefix('#').expect("in this document");
            assert!(document.pointer(path).is_some(), "{to}");
        }
    }

    #[test]
    fn each_route_is_there_once() {
        let document = document();
        let paths = document["paths"].as_object().expect("paths");
        let methods: usize = paths
            .values()
            .map(|path| path.as_object().expect("methods").len())
            .sum();
        assert_eq!(methods, ROUTES.len());
    }
}
