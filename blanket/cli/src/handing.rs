//! Descriptors that go along with a line over a control socket (unix(7), `SCM_RIGHTS`): what
//! whoever asks has opened, and the VM's process in its box cannot.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors with a line: a tap's queues.
const MOST: usize = 16;

/// Sends a line, its end included, with descriptors.
pub fn send(stream: &UnixStream, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    if descriptors.len() > MOST {
        bail!(
            "{} descriptors are too many for a request",
            descriptors.len()
        );
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(line)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    std::io::Write::write_all(&mut &*stream, line.get(sent..).unwrap_or_default())?;
    Ok(())
}

/// Receives a line of at most `most` bytes, with its end, and the descriptors that came
/// with it. Empty if nothing came.
pub fn receive(stream: &UnixStream, most: usize) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    let mut bytes = [0; 4096];
    while line.len() <= most {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = match recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => continue,
            got => got.context("no request")?.bytes,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(all) = message {
                descriptors.extend(all);
            }
        }
        if descriptors.len() > MOST {
            bail!("too many descriptors with a request");
        }
        let part = &bytes[..got];
        if let Some(end) = part.iter().position(|byte| *byte == b'\n') {
            line.extend(&part[..=end]);
            return Ok((line, descriptors));
        }
        line.extend(part);
        if got == 0 {
            return Ok((line, descriptors));
        }
    }
    bail!("a request of more than {most} bytes")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn descriptors_come_with_their_line() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        send(&ours, b"take this\n", &[writer.as_fd(), writer.as_fd()]).expect("sent");
        drop(writer);
        let (line, mut descriptors) = receive(&theirs, 100).expect("received");
        assert_eq!((&*line, descriptors.len()), (&b"take this\n"[..], 2));
        let mut end = std::io::PipeWriter::from(descriptors.pop().expect("one"));
        end.write_all(b"through").expect("written");
        drop((end, descriptors));
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "through");
    }

    #[test]
    fn lines_without_an_end_and_long_ones() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        send(&ours, &[b'x'; 5000], &[]).expect("sent");
        assert!(receive(&theirs, 4999).is_err());
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        send(&ours, b"half", &[]).expect("sent");
        drop(ours);
        assert_eq!(receive(&theirs, 100).expect("received").0, b"half");
        assert!(receive(&theirs, 100).expect("received").0.is_empty());
    }
}
