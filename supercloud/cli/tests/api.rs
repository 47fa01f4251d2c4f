//! The API is what its document says, and nobody else's.

mod common;

use std::sync::Arc;

use common::{Lab, Node, until};
use hyper::Method;
use serde_json::{Value, json};
use supercloud_api::{Code, Error, JoinToken, openapi};
use supercloud_node::client::{self, Agent};
use supercloud_node::{config, tls};

/// What of a value is not as its schema says.
fn differences(document: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    if let Some(to) = schema["$ref"].as_str() {
        let to = document.pointer(to.trim_start_matches('#'));
        return differences(document, to.expect("it is there"), value, at);
    }
    for kind in ["oneOf", "anyOf"] {
        if let Some(all) = schema[kind].as_array() {
            let fits = all
                .iter()
                .any(|one| differences(document, one, value, at).is_empty());
            return if fits {
                Vec::new()
            } else {
                vec![format!("{at}: {value} is none of {schema}")]
            };
        }
    }
    if let Some(all) = schema["allOf"].as_array() {
        return all
            .iter()
            .flat_map(|one| differences(document, one, value, at))
            .collect();
    }
    let is = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let mut found = Vec::new();
    let allowed = match &schema["type"] {
        Value::String(one) => one == is,
        Value::Array(all) => all.iter().any(|one| one == is),
        _ => schema.as_object().is_some_and(serde_json::Map::is_empty),
    };
    if !allowed {
        found.push(format!("{at}: {value} is not {}", schema["type"]));
    }
    if let Some(all) = schema["enum"].as_array()
        && !all.contains(value)
    {
        found.push(format!("{at}: {value} is none of {all:?}"));
    }
    if let Some(list) = value.as_array() {
        for (index, one) in list.iter().enumerate() {
            found.extend(differences(
                document,
                &schema["items"],
                one,
                &format!("{at}/{index}"),
            ));
        }
    }
    if let Some(object) = value.as_object() {
        for (name, one) in object {
            match schema["properties"].get(name) {
                Some(schema) => {
                    found.extend(differences(document, schema, one, &format!("{at}/{name}")));
                }
                None => found.push(format!("{at}/{name} is not in the document")),
            }
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            if !object.contains_key(name.as_str().expect("a name")) {
                found.push(format!("{at}/{name} is missing"));
            }
        }
    }
    found
}

async fn ask(
    node: &Node,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, Error> {
    let socket = config::socket(&node.data().with_file_name("run"));
    let mut agent = Agent::here(&socket, None).await?;
    agent.ask(method, path, body, client::LONG).await
}

/// The schema of an answer.
fn schema<'a>(document: &'a Value, method: &str, path: &str) -> &'a Value {
    let operation = &document["paths"][path][method];
    assert!(
        operation.is_object(),
        "{method} {path} is not in the document"
    );
    &operation["responses"]["200"]["content"]["application/json"]["schema"]
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_as_the_document_says() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    a.run(&["vm", "migrate", "web", "--to", "b", "--id", "one"])
        .ok();
    b.run(&["vm", "migrate", "web", "--to", "a", "--id", "two"])
        .ok();
    a.run(&[
        "vm",
        "migrate",
        "web",
        "--to",
        "b",
        "--id",
        "three",
        "--dry-run",
    ])
    .ok();
    let document = openapi::document();
    let served = ask(&a, Method::GET, "/v1/openapi.json", None)
        .await
        .expect("served");
    assert_eq!(served, document);
    let image = lab.path().join("base.raw").display().to_string();
    let spec = json!({ "image": "base", "memory": 16 << 20, "cpus": 1, "nets": [] });
    let asked = [
        ("GET", "/v1/node", "/v1/node", None),
        ("GET", "/v1/nodes", "/v1/nodes", None),
        ("GET", "/v1/members", "/v1/members", None),
        ("GET", "/v1/doctor", "/v1/doctor", None),
        ("GET", "/v1/cpu", "/v1/cpu", None),
        ("GET", "/v1/vms", "/v1/vms", None),
        ("GET", "/v1/vms/{name}", "/v1/vms/web", None),
        ("GET", "/v1/operations", "/v1/operations", None),
        ("GET", "/v1/operations/{id}", "/v1/operations/one", None),
        (
            "POST",
            "/v1/operations/{id}/cancel",
            "/v1/operations/one/cancel",
            None,
        ),
        ("GET", "/v1/images", "/v1/images", None),
        ("GET", "/v1/arrivals/{operation}", "/v1/arrivals/two", None),
        (
            "DELETE",
            "/v1/arrivals/{operation}",
            "/v1/arrivals/none",
            None,
        ),
        (
            "POST",
            "/v1/arrivals/{operation}/claim",
            "/v1/arrivals/two/claim",
            None,
        ),
        (
            "POST",
            "/v1/arrivals/{operation}/bereave",
            "/v1/arrivals/two/bereave",
            None,
        ),
        (
            "POST",
            "/v1/tokens",
            "/v1/tokens",
            Some(json!({ "uses": 1, "seconds": 60 })),
        ),
        (
            "PUT",
            "/v1/images/{name}",
            "/v1/images/base",
            Some(json!({ "path": image })),
        ),
        ("PUT", "/v1/vms/{name}", "/v1/vms/next", Some(spec)),
        (
            "POST",
            "/v1/vms/{name}/stop",
            "/v1/vms/next/stop",
            Some(json!({})),
        ),
        (
            "POST",
            "/v1/vms/{name}/snapshot",
            "/v1/vms/next/snapshot",
            Some(json!({ "name": "six" })),
        ),
        ("GET", "/v1/snapshots", "/v1/snapshots", None),
        ("GET", "/v1/snapshots/{name}", "/v1/snapshots/six", None),
        ("POST", "/v1/vms/{name}/start", "/v1/vms/next/start", None),
        (
            "POST",
            "/v1/snapshots/{name}/restore",
            "/v1/snapshots/six/restore",
            Some(json!({ "name": "seven" })),
        ),
        (
            "POST",
            "/v1/vms/{name}/migrate",
            "/v1/vms/next/migrate",
            Some(json!({ "to": "b", "id": "four" })),
        ),
        (
            "POST",
            "/v1/drain",
            "/v1/drain",
            Some(json!({ "id": "five" })),
        ),
    ];
    for (method, path, at, body) in asked {
        let verb = method.parse().expect("a method");
        let answer = ask(&a, verb, at, body.as_ref()).await;
        let answer = answer.unwrap_or_else(|error| panic!("{method} {at}: {error:?}"));
        let schema = schema(&document, &method.to_lowercase(), path);
        let found = differences(&document, schema, &answer, at);
        assert_eq!(found, Vec::<String>::new(), "{method} {at}: {answer}");
    }
    // An error is one of the document's, too.
    let error = ask(&a, Method::GET, "/v1/vms/none", None)
        .await
        .expect_err("none");
    let error = serde_json::to_value(error).expect("JSON");
    let schema = json!({ "$ref": "#/components/schemas/Error" });
    assert_eq!(
        differences(&document, &schema, &error, "error"),
        Vec::<String>::new()
    );
    for (path, code) in [
        ("/v1/nothing", Code::NotFound),
        ("/nothing", Code::NotFound),
    ] {
        assert_eq!(
            ask(&a, Method::GET, path, None)
                .await
                .expect_err("none")
                .code,
            code
        );
    }
    let wrong = ask(
        &a,
        Method::PUT,
        "/v1/vms/x",
        Some(&json!({ "memory": "much" })),
    )
    .await;
    assert_eq!(wrong.expect_err("wrong").code, Code::BadRequest);

    let text = a.run(&["metrics"]).ok().out;
    assert!(
        text.contains("supercloud_node_reachable{node=\"b\"} 1"),
        "{text}"
    );
    assert!(
        text.lines()
            .all(|line| line.starts_with("# ") || line.starts_with("supercloud_"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_cleared_away_is_not_prepared_afterwards() {
    let lab = Lab::new();
    let a = lab.first("a");
    let b = lab.joined("b", &a);
    a.run_vm(&lab, "web");
    // Its source gave up before its request had come.
    let path = "/v1/arrivals/late";
    let cleared = ask(&b, Method::DELETE, path, None).await.expect("cleared");
    assert_eq!(cleared["state"], "unknown");
    let body = json!({ "operation": "late", "from": "a", "vm": a.vm("web"), "images": [] });
    let late = ask(&b, Method::PUT, path, Some(&body)).await;
    assert_eq!(late.expect_err("late").code, Code::Conflict);
    assert!(b.vm("web").is_none_or(|vm| vm["node"] == "a"));
    assert!(b.phase("web").is_none(), "nothing waits for it");
    let again = ask(&b, Method::DELETE, path, None).await.expect("cleared");
    assert_eq!(again["state"], "refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_without_a_certificate_gets_anything() {
    let lab = Lab::new();
    let a = lab.first("a");
    let token: JoinToken = a.token().parse().expect("a token");
    let config = tls::joining(&token.ca).expect("made");
    for route in supercloud_api::ROUTES {
        if route.path == "/v1/join" {
            continue;
        }
        let mut agent = Agent::of_ca(&a.address(), Arc::clone(&config))
            .await
            .expect("connected");
        let path = route.path.replace(['{', '}'], "");
        let method = route.method.word().parse().expect("a method");
        let answer = agent
            .ask::<Value>(method, &path, Some(&json!({})), client::ANSWER)
            .await;
        assert_eq!(answer.expect_err(&path).code, Code::NotAllowed, "{path}");
    }
    // Of another cluster: not even a connection.
    let other = lab.first("other");
    let theirs: JoinToken = other.token().parse().expect("a token");
    let strange = tls::joining(&theirs.ca).expect("made");
    assert!(Agent::of_ca(&a.address(), strange).await.is_err());
    // A certificate of another CA is worse than none.
    let mallory = supercloud_node::pki::Identity::first("a").expect("made");
    let mixed = supercloud_node::pki::Identity {
        ca: supercloud_node::pki::Identity::first("x").expect("made").ca,
        ..mallory.clone()
    };
    for identity in [mallory, mixed] {
        let config = tls::client(&identity, &tls::Removed::default()).expect("made");
        assert!(Agent::there("a", &a.address(), config).await.is_err());
    }
    // Plain text is no TLS.
    use std::io::{Read as _, Write as _};
    let mut plain = std::net::TcpStream::connect(a.address()).expect("connected");
    plain
        .write_all(b"GET /v1/vms HTTP/1.1\r\nhost: a\r\n\r\n")
        .expect("sent");
    let mut said = Vec::new();
    let _ = plain.read_to_end(&mut said);
    assert!(!said.starts_with(b"HTTP"), "{said:?}");
}

#[test]
fn what_happens_is_told() {
    let lab = Lab::new();
    let a = lab.first("a");
    let mut listener = a.begin(&["events", "--json"]);
    let stdout = listener.stdout.take().expect("piped");
    let heard = std::thread::spawn(move || {
        use std::io::{BufRead as _, BufReader};
        BufReader::new(stdout)
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("vm.started"))
    });
    // Whoever listens late hears what comes then.
    let mut number = 0;
    until("it is told", || {
        number += 1;
        a.run_vm(&lab, &format!("vm{number}"));
        heard.is_finished()
    });
    let line = heard.join().expect("read").expect("told");
    let event: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(
        (&event["node"], &event["kind"]),
        (&json!("a"), &json!("vm.started"))
    );
    let _ = listener.kill();
    let _ = listener.wait();
}
