//! Readers that fail once the caller wants the image no more, so that no decoder outlives its request.

use std::io::{self, BufRead, Read, Seek, SeekFrom};

/// Asked now and then; true once nobody waits for the image.
pub(super) type Stopped<'a> = &'a dyn Fn() -> bool;

/// Bytes between two questions.
const WINDOW: usize = 1 << 16;

fn check(stopped: Stopped) -> io::Result<()> {
    if stopped() { Err(io::Error::other("decoding was stopped")) } else { Ok(()) }
}

pub(super) struct Whole<'a> {
    bytes: &'a [u8],
    position: usize,
    /// Up to here there is no need to ask.
    window_end: usize,
    stopped: Stopped<'a>,
}

impl<'a> Whole<'a> {
    pub(super) fn new(bytes: &'a [u8], stopped: Stopped<'a>) -> Self {
        Self { bytes, position: 0, window_end: 0, stopped }
    }
}

impl BufRead for Whole<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position >= self.window_end {
            check(self.stopped)?;
            self.window_end = self.position + WINDOW;
        }
        Ok(self.bytes.get(self.position..).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.position += count;
    }
}

impl Read for Whole<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

impl Seek for Whole<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => usize::try_from(at).ok(),
            SeekFrom::Current(by) => isize::try_from(by).ok().and_then(|by| self.position.checked_add_signed(by)),
            SeekFrom::End(by) => isize::try_from(by).ok().and_then(|by| self.bytes.len().checked_add_signed(by)),
        };
        self.position = target.ok_or(io::ErrorKind::InvalidInput)?;
        // Jumping about is asked about too.
        self.window_end = self.window_end.min(self.position);
        Ok(self.position as u64)
    }
}

/// Reads slices one after the other, as if they were one file.
pub(super) struct Joined<'a, I> {
    slices: I,
    current: &'a [u8],
    stopped: Stopped<'a>,
}

impl<'a, I: Iterator<Item = &'a [u8]>> Joined<'a, I> {
    pub(super) fn new(slices: impl IntoIterator<IntoIter = I>, stopped: Stopped<'a>) -> Self {
        Self { slices: slices.into_iter(), current: &[], stopped }
    }
}

impl<'a, I: Iterator<Item = &'a [u8]>> BufRead for Joined<'a, I> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        check(self.stopped)?;
        while self.current.is_empty() {
            let Some(next) = self.slices.next() else { break };
            self.current = next;
        }
        Ok(&self.current[..self.current.len().min(WINDOW)])
    }

    fn consume(&mut self, count: usize) {
        self.current = &self.current[count..];
    }
}

impl<'a, I: Iterator<Item = &'a [u8]>> Read for Joined<'a, I> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

impl<'a, I: Iterator<Item = &'a [u8]>> Seek for Joined<'a, I> {
    /// The PNG decoder asks for this ability and does not use it.
    fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn read_buffered(reader: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
    let next = reader.fill_buf()?;
    let count = next.len().min(out.len());
    out[..count].copy_from_slice(&next[..count]);
    reader.consume(count);
    Ok(count)
}
