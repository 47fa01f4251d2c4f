use super::*;

fn net(nets: &mut Nets, name: &str, subnet: Option<&str>) -> Result<Net, Error> {
    let subnet = subnet.map(str::to_owned);
    make(nets, name, &NewNet { subnet }, &reached())
}

fn vm(vm: &str, node: &str, moves: u64, publish: &[&str]) -> NewNetAddress {
    NewNetAddress {
        vm: vm.into(),
        node: node.into(),
        moves,
        publish: publish.iter().map(|&text| text.to_owned()).collect(),
    }
}

fn node(name: &str, key: u8) -> NetNode {
    NetNode {
        node: name.into(),
        number: 0,
        public_key: PublicKey([key; 32]).to_string(),
    }
}

const WEB: &str = "02:00:00:00:00:01";
const DB: &str = "02:00:00:00:00:02";

/// Two nodes, a network, two VMs.
fn good() -> Nets {
    let mut nets = Nets::default();
    net(&mut nets, "demo", None).expect("made");
    number(&mut nets, &node("a", 1)).expect("numbered");
    number(&mut nets, &node("b", 2)).expect("numbered");
    place(&mut nets, "demo", WEB, &vm("web", "a", 0, &["8080:80"])).expect("placed");
    place(&mut nets, "demo", DB, &vm("db", "b", 0, &[])).expect("placed");
    nets
}

fn reached() -> HashMap<String, IpAddr> {
    let ip = |last| IpAddr::from([192, 0, 2, last]);
    HashMap::from([("a".into(), ip(1)), ("b".into(), ip(2))])
}

#[test]
fn networks_get_free_numbers_and_addresses() {
    let mut nets = good();
    let demo = nets.nets[0].clone();
    assert_eq!((demo.vni, demo.subnet.as_str()), (1, "10.64.0.0/16"));
    assert_eq!(demo.ports[0].address, "10.64.0.2");
    assert_eq!(demo.ports[1].address, "10.64.0.3");
    let other = net(&mut nets, "other", None).expect("made");
    assert_eq!((other.vni, other.subnet.as_str()), (2, "10.65.0.0/16"));
    // The same again is the same.
    assert_eq!(net(&mut nets, "other", Some("10.65.0.0/16")), Ok(other));
    for (name, subnet, code) in [
        ("other", Some("10.66.0.0/16"), Code::Conflict),
        ("third", Some("10.64.3.0/24"), Code::BadRequest),
        ("third", Some("8.8.0.0/16"), Code::BadRequest),
        ("third", Some("x"), Code::BadRequest),
        ("Third", None, Code::BadRequest),
        ("user", None, Code::BadRequest),
    ] {
        let before = nets.clone();
        let error = net(&mut nets, name, subnet).expect_err(name);
        assert_eq!((error.code, &nets), (code, &before), "{error}");
    }
    assert_eq!(
        remove(&mut nets, "demo").map_err(|error| error.code),
        Err(Code::Conflict)
    );
    release(&mut nets, "demo", WEB);
    release(&mut nets, "demo", DB);
    assert_eq!(remove(&mut nets, "demo"), Ok(()));
    assert_eq!(nets.nets.len(), 1);
}

#[test]
fn a_network_has_no_address_of_a_node() {
    let mut nets = Nets::default();
    let at = |ip: [u8; 4]| HashMap::from([("a".to_owned(), IpAddr::from(ip))]);
    let subnet = |text: &str| NewNet {
        subnet: Some(text.into()),
    };
    let error = make(
        &mut nets,
        "demo",
        &subnet("10.0.0.0/8"),
        &at([10, 77, 0, 2]),
    );
    let error = error.expect_err("it has");
    assert_eq!(error.code, Code::BadRequest);
    assert!(error.message.contains("10.77.0.2 of the node a"), "{error}");
    // What is chosen is chosen so.
    let any = NewNet::default();
    let made = make(&mut nets, "demo", &any, &at([10, 64, 1, 1])).expect("made");
    assert_eq!(made.subnet, "10.65.0.0/16");
    let covers = |ip: [u8; 4]| {
        let found = covering(&nets, IpAddr::from(ip)).expect("a list");
        found.map(|net| net.name.clone())
    };
    assert_eq!(covers([10, 65, 3, 4]).as_deref(), Some("demo"));
    assert_eq!(covers([10, 66, 0, 1]), None);
}

#[test]
fn what_is_wrong_changes_nothing() {
    let mut nets = good();
    let before = nets.clone();
    for (net, mac, wanted) in [
        ("none", "02:00:00:00:00:03", vm("x", "a", 0, &[])),
        ("demo", "02:53:43:00:00:03", vm("x", "a", 0, &[])),
        ("demo", "03:00:00:00:00:03", vm("x", "a", 0, &[])),
        ("demo", "02:00:00:00:00:03", vm("web", "a", 0, &[])),
        ("demo", "02:00:00:00:00:03", vm("a.b", "a", 0, &[])),
        ("demo", "02:00:00:00:00:03", vm("x", "a", 0, &["8080"])),
        ("demo", "02:00:00:00:00:03", vm("x", "a", 0, &["0:1"])),
        ("demo", "02:00:00:00:00:03", vm("x", "a", 0, &["51820"])),
    ] {
        assert!(
            place(&mut nets, net, mac, &wanted).is_err(),
            "{net} {mac} {wanted:?}"
        );
        assert_eq!(nets, before);
    }
    let mut wrong = node("c", 3);
    wrong.public_key = "x".into();
    assert!(number(&mut nets, &wrong).is_err());
    assert!(
        number(&mut nets, &node("c", 1)).is_err(),
        "two nodes with one key"
    );
    assert_eq!(nets, before);
}

#[test]
fn a_vm_is_where_it_moved_last() {
    let mut nets = good();
    let web = |nets: &Nets| nets.nets[0].ports[0].clone();
    place(&mut nets, "demo", WEB, &vm("web", "b", 1, &[])).expect("moved");
    assert_eq!(
        (web(&nets).node.as_str(), web(&nets).left.as_deref()),
        ("b", Some("a"))
    );
    assert_eq!(web(&nets).publish, ["8080:80"]);
    // Heard late, and heard twice.
    place(&mut nets, "demo", WEB, &vm("web", "a", 1, &[])).expect("nothing");
    assert_eq!(web(&nets).node, "b");
    let moved = |node: &str, moves| NetMoved {
        node: node.into(),
        mac: WEB.into(),
        moves,
    };
    assert!(!is_news(&nets, &moved("a", 1)) && is_news(&nets, &moved("a", 2)));
    let mut seen = nets.clone();
    overlay(&mut seen, [moved("a", 1), moved("a", 2)].iter());
    assert_eq!(
        (web(&seen).node.as_str(), web(&seen).left.as_deref()),
        ("a", Some("b"))
    );
    // A VM that nobody has is no news.
    let stranger = NetMoved {
        mac: "02:00:00:00:00:99".into(),
        ..moved("a", 9)
    };
    assert!(!is_news(&nets, &stranger));
}

#[test]
fn nodes_see_the_same_network() {
    let nets = good();
    let a = wanted(&nets, "a", &reached(), &[]).expect("a");
    let b = wanted(&nets, "b", &reached(), &[WEB]).expect("b");
    assert_eq!((a.node.get(), b.node.get()), (1, 2));
    assert_eq!(a.peers[0].endpoint, Some(([192, 0, 2, 2], 51820).into()));
    assert_eq!(a.networks[0].ports[1], b.networks[0].ports[1]);
    // It is on its way to b, which only b knows.
    assert_eq!(a.networks[0].ports[0].arriving, None);
    assert_eq!(b.networks[0].ports[0].arriving, Some(b.node));
    // A node that was removed is nobody's peer, and its VMs are nowhere.
    let left = HashMap::from([("a".to_owned(), IpAddr::from([192, 0, 2, 1]))]);
    let a = wanted(&nets, "a", &left, &[]).expect("a");
    assert!(a.peers.is_empty());
    assert_eq!(a.networks[0].ports.len(), 1);
    assert!(wanted(&nets, "c", &reached(), &[]).is_err());
}
