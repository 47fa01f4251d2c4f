//! The CPU of a VM that is to go to several nodes: what all of them have.

use std::collections::BTreeSet;

use supercloud_api::{Code, Error, NodeCpu};

use crate::ask::To;

/// What `blanket run --cpu` is told so that a VM that starts at `to`, on `host`, can go to these nodes.
///
/// # Errors
/// A node does not answer; no VM can go to one of them and back.
pub async fn for_nodes(to: &To, host: Option<&str>, nodes: &[String]) -> Result<String, Error> {
    if !matches!(host, None | Some("auto" | "module" | "kvm")) {
        let why = "a VM runs on auto, module or kvm";
        return Err(Error::new(Code::BadRequest, why, ""));
    }
    let path = match host {
        None => "/v1/cpu".to_owned(),
        Some(host) => format!("/v1/cpu?host={host}"),
    };
    let mut cpus = vec![(
        "the node that it starts on".to_owned(),
        to.get(&path).await?,
    )];
    for name in nodes {
        supercloud_api::name("a node", name)?;
        let there = To {
            node: Some(name.clone()),
        };
        cpus.push((name.clone(), there.get(&path).await?));
    }
    shared(&cpus)
}

/// What all of these have, and none of them finds more of in the VM than the others.
fn shared(cpus: &[(String, NodeCpu)]) -> Result<String, Error> {
    let unfit = |what: String, hint: &str| Err(Error::new(Code::Unfit, what, hint));
    let Some(((_, first), others)) = cpus.split_first() else {
        return Ok("host".into());
    };
    if let Some((name, other)) = others.iter().find(|(_, it)| it.vendor != first.vendor) {
        return unfit(
            format!(
                "the CPU of {name} is of {}, and the one that the VM starts on of {}: no VM goes from one to the other",
                other.vendor, first.vendor
            ),
            "name nodes with CPUs of one vendor",
        );
    }
    let mut common = first.features.clone();
    for (_, other) in others {
        common.retain(|feature| other.features.contains(feature));
    }
    for (name, cpu) in cpus {
        let bare = shown(cpu, &common);
        if !bare.is_empty() {
            return unfit(
                format!(
                    "{name} cannot hide {} from a VM's programs, which not all of them have",
                    bare.iter().copied().collect::<Vec<_>>().join(", ")
                ),
                "under the module only what needs a component of XSAVE can be hidden (`blanket cpu` there): \
                 leave such nodes out, or have VMs run inside KVM there",
            );
        }
    }
    // Also what only others have: the VM must not find it there.
    let all: BTreeSet<&String> = cpus.iter().flat_map(|(_, cpu)| &cpu.features).collect();
    let gone = all.into_iter().filter(|feature| !common.contains(*feature));
    Ok(gone.fold("host".to_owned(), |cpu, feature| cpu + ",-" + feature))
}

/// What programs of a VM that is to have these features find on such a node beside them.
fn shown<'a>(cpu: &'a NodeCpu, features: &'a BTreeSet<String>) -> BTreeSet<&'a str> {
    if cpu.hides_all {
        return BTreeSet::new();
    }
    let off = cpu
        .components
        .iter()
        .filter(|(name, _)| !features.contains(*name));
    let hidden: BTreeSet<&String> = off.flat_map(|(_, with)| with).collect();
    let more = cpu.features.difference(features);
    more.filter(|name| !hidden.contains(name))
        .map(String::as_str)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &str) -> BTreeSet<String> {
        names.split_whitespace().map(str::to_owned).collect()
    }

    /// A node; under the module it cannot hide what needs no component.
    fn node(name: &str, hides_all: bool, features: &str) -> (String, NodeCpu) {
        let features = set(features);
        let components = [("xsave", "xsave avx avx2 fma"), ("avx", "avx avx2 fma")];
        let of = |with: &str| set(with).intersection(&features).cloned().collect();
        let cpu = NodeCpu {
            host: if hides_all { "kvm" } else { "module" }.into(),
            vendor: "AuthenticAMD".into(),
            components: components
                .iter()
                .filter(|(name, _)| features.contains(*name))
                .map(|(name, with)| ((*name).to_owned(), of(with)))
                .collect(),
            features,
            hides_all,
        };
        (name.into(), cpu)
    }

    #[test]
    fn what_all_have() {
        let of = |cpus: &[(String, NodeCpu)]| shared(cpus).expect("they share it");
        let whole = "sse2 bmi1 xsave avx avx2 fma";
        let same = [node("a", false, whole), node("b", true, whole)];
        assert_eq!(of(&same), "host");
        let old = [node("a", false, whole), node("b", false, "sse2 bmi1 xsave")];
        assert_eq!(of(&old), "host,-avx,-avx2,-fma");
        let older = [node("a", true, whole), node("b", false, "sse2")];
        assert_eq!(of(&older), "host,-avx,-avx2,-bmi1,-fma,-xsave");
        // The other one has more.
        let richer = [node("a", false, "sse2"), node("b", true, "sse2 aes")];
        assert_eq!(of(&richer), "host,-aes");
    }

    #[test]
    fn what_one_of_them_cannot_hide() {
        let no = |cpus: &[(String, NodeCpu)]| shared(cpus).expect_err("it cannot").message;
        let here = node("a", false, "sse2 bmi1 xsave avx avx2");
        let why = no(&[here.clone(), node("b", true, "sse2 xsave avx avx2")]);
        assert!(why.contains("a cannot hide bmi1 from"), "{why}");
        let why = no(&[here.clone(), node("b", true, "sse2 bmi1 xsave avx")]);
        assert!(why.contains("a cannot hide avx2 from"), "{why}");
        let why = no(&[here.clone(), node("b", false, "sse2 bmi1 xsave aes")]);
        assert!(why.contains("b cannot hide aes from"), "{why}");
        let mut other = node("b", true, "sse2");
        other.1.vendor = "GenuineIntel".into();
        let why = no(&[here, other]);
        assert!(why.contains("of GenuineIntel"), "{why}");
    }
}
