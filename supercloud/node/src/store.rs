//! What an agent remembers: an embedded store whose transactions are on the disk when they
//! are done, so that an agent that is killed at any moment finds all of a change or nothing.

use std::fs::{DirBuilder, File};
use std::marker::PhantomData;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use supercloud_api::Error;

/// Records of one kind, by their names.
#[derive(Debug)]
pub struct Table<T> {
    name: &'static str,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Table<T> {}

impl<T> Table<T> {
    /// A table.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            kind: PhantomData,
        }
    }

    fn definition(&self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.name)
    }
}

/// The store.
#[derive(Debug)]
pub struct Store(Database);

/// A change that is being made.
pub struct Change {
    inner: WriteTransaction,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::failed(format!("the node's store: {error}"))
}

fn read<T: DeserializeOwned>(name: &str, key: &str, bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| failed(format!("{name} {key}: {error}")))
}

impl Store {
    /// Opens or makes it, for its owner alone.
    ///
    /// # Errors
    /// The disk, or another agent that has it.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(directory);
        made.map_err(|error| failed(format!("{}: {error}", directory.display())))?;
        let path = directory.join("node.redb");
        // Its mode first: `redb` opens what is there.
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed(format!("{}: {error}", path.display())))?;
        let database = Database::builder()
            .set_cache_size(4 << 20)
            .create(&path)
            .map_err(|error| {
                Error::new(
                    supercloud_api::Code::Conflict,
                    format!("{}: {error}", path.display()),
                    "one agent has one directory: is another one running? `supercloud node list` tells",
                )
            })?;
        Ok(Self(database))
    }

    /// Changes something: all of it or, after an error, nothing.
    ///
    /// # Errors
    /// What `work` says, or the disk.
    pub fn change<T>(
        &self,
        work: impl FnOnce(&mut Change) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let inner = self.0.begin_write().map_err(failed)?;
        let mut change = Change { inner };
        let done = work(&mut change)?;
        change.inner.commit().map_err(failed)?;
        Ok(done)
    }

    /// A record.
    ///
    /// # Errors
    /// The disk.
    pub fn get<T: DeserializeOwned>(&self, table: Table<T>, key: &str) -> Result<Option<T>, Error> {
        let reading = self.0.begin_read().map_err(failed)?;
        let opened = match reading.open_table(table.definition()) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let found = opened.get(key).map_err(failed)?;
        found
            .map(|bytes| read(table.name, key, bytes.value()))
            .transpose()
    }

    /// All records of a kind, in the order of their names.
    ///
    /// # Errors
    /// The disk.
    pub fn all<T: DeserializeOwned>(&self, table: Table<T>) -> Result<Vec<T>, Error> {
        let reading = self.0.begin_read().map_err(failed)?;
        let opened = match reading.open_table(table.definition()) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            opened => opened.map_err(failed)?,
        };
        let mut all = Vec::new();
        for entry in opened.iter().map_err(failed)? {
            let (key, bytes) = entry.map_err(failed)?;
            all.push(read(table.name, key.value(), bytes.value())?);
        }
        Ok(all)
    }
}

impl Change {
    /// A record, as this change has it.
    ///
    /// # Errors
    /// The disk.
    pub fn get<T: DeserializeOwned>(&self, table: Table<T>, key: &str) -> Result<Option<T>, Error> {
        let opened = self.inner.open_table(table.definition()).map_err(failed)?;
        let found = opened.get(key).map_err(failed)?;
        found
            .map(|bytes| read(table.name, key, bytes.value()))
            .transpose()
    }

    /// All records of a kind.
    ///
    /// # Errors
    /// The disk.
    pub fn all<T: DeserializeOwned>(&self, table: Table<T>) -> Result<Vec<T>, Error> {
        let opened = self.inner.open_table(table.definition()).map_err(failed)?;
        let mut all = Vec::new();
        for entry in opened.iter().map_err(failed)? {
            let (key, bytes) = entry.map_err(failed)?;
            all.push(read(table.name, key.value(), bytes.value())?);
        }
        Ok(all)
    }

    /// Writes a record.
    ///
    /// # Errors
    /// The disk.
    pub fn put<T: Serialize>(
        &mut self,
        table: Table<T>,
        key: &str,
        value: &T,
    ) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value).map_err(failed)?;
        let mut opened = self.inner.open_table(table.definition()).map_err(failed)?;
        opened.insert(key, bytes.as_slice()).map_err(failed)?;
        Ok(())
    }

    /// Removes the records of a kind that are not to be kept.
    ///
    /// # Errors
    /// The disk; one that cannot be read.
    pub fn retain<T: DeserializeOwned>(
        &mut self,
        table: Table<T>,
        keep: impl Fn(&T) -> bool,
    ) -> Result<(), Error> {
        let mut opened = self.inner.open_table(table.definition()).map_err(failed)?;
        let mut gone = Vec::new();
        for entry in opened.iter().map_err(failed)? {
            let (key, bytes) = entry.map_err(failed)?;
            if !keep(&read(table.name, key.value(), bytes.value())?) {
                gone.push(key.value().to_owned());
            }
        }
        for key in gone {
            opened.remove(key.as_str()).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes a record, if it is there.
    ///
    /// # Errors
    /// The disk.
    pub fn remove<T>(&mut self, table: Table<T>, key: &str) -> Result<(), Error> {
        let mut opened = self.inner.open_table(table.definition()).map_err(failed)?;
        opened.remove(key).map_err(failed)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NUMBERS: Table<u32> = Table::new("numbers");

    #[test]
    fn a_change_is_whole_or_not_at_all() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Store::open(&directory.path().join("data")).expect("made");
        let mode = |name: &str| {
            let path = directory.path().join(name);
            path.metadata().expect("there").permissions().mode() & 0o777
        };
        assert_eq!((mode("data"), mode("data/node.redb")), (0o700, 0o600));
        assert_eq!(store.get(NUMBERS, "a").expect("read"), None);
        store
            .change(|change| {
                change.put(NUMBERS, "a", &1)?;
                change.put(NUMBERS, "b", &2)
            })
            .expect("written");
        let error = store.change(|change| {
            change.put(NUMBERS, "a", &3)?;
            change.remove(NUMBERS, "b")?;
            Err::<(), _>(Error::failed("no"))
        });
        assert!(error.is_err());
        assert_eq!(store.all(NUMBERS).expect("read"), [1, 2]);
        // One agent at a time.
        assert!(Store::open(&directory.path().join("data")).is_err());
        drop(store);
        let store = Store::open(&directory.path().join("data")).expect("opened");
        assert_eq!(store.get(NUMBERS, "b").expect("read"), Some(2));
    }
}
