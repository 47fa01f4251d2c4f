//! Drives `supercloud-network` by hand:
//!
//! ```text
//! fabric key                     make this node's key if there is none, and print the public one
//! fabric apply RECORD            make this machine be as the record says; prints what was done
//! fabric arrives RECORD MAC NODE that VM is on its way there: changes the record
//! fabric moved RECORD MAC NODE   that VM runs there now: entries first, then the record
//! fabric clear                   remove all
//! ```
//!
//! A record is a [`Wanted`] in JSON. The key and the files of this boot are in `/run/fabric`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use supercloud_network::{Fabric, Options, PrivateKey, Wanted};

const DIR: &str = "/run/fabric";

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(&words))
}

async fn run(words: &[&str]) -> Result<()> {
    let key = key()?;
    let open = || {
        Fabric::open(Options {
            key: key.clone(),
            dir: DIR.into(),
        })
    };
    match *words {
        ["key"] => println!("{}", key.public()),
        ["apply", record] => {
            for line in open()?.apply(&load(record)?).await?.done {
                println!("{line}");
            }
        }
        ["moved", record, mac, node] => {
            let mut wanted = load(record)?;
            open()?
                .moved(&mut wanted, mac.parse()?, node.parse()?)
                .await?;
            std::fs::write(record, serde_json::to_vec_pretty(&wanted)?)?;
        }
        ["arrives", record, mac, node] => {
            let mut wanted = load(record)?;
            if !wanted.arriving(mac.parse()?, Some(node.parse()?)) {
                bail!("no VM has the MAC {mac}");
            }
            std::fs::write(record, serde_json::to_vec_pretty(&wanted)?)?;
        }
        ["clear"] => {
            for line in open()?.clear().await?.done {
                println!("{line}");
            }
        }
        _ => bail!(
            "fabric key | apply RECORD | arrives RECORD MAC NODE | moved RECORD MAC NODE | clear"
        ),
    }
    Ok(())
}

fn load(record: &str) -> Result<Wanted> {
    let text = std::fs::read(record).with_context(|| format!("cannot read {record}"))?;
    serde_json::from_slice(&text).with_context(|| format!("{record} is no record"))
}

fn key() -> Result<PrivateKey> {
    let path = Path::new(DIR).join("key");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.parse()?),
        Err(_) => {
            std::fs::create_dir_all(DIR)?;
            let key = PrivateKey::generate();
            std::fs::write(&path, key.to_text())?;
            Ok(key)
        }
    }
}
