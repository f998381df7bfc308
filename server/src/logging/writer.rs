//! Where log lines go: a thread of its own writes them, so that a reader that stands still stops nothing but the log.
//!
//! Lines wait in a queue of [`MAX_WAITING_BYTES`]. A line that finds the queue full is lost, and so is a line that the
//! output refuses (a closed pipe, a full disk). Lost lines are counted; [`super::report`] says how many there were.
//! (`tracing-appender` does the same with a queue that counts lines, not bytes, and without counting what the output
//! refuses; it would add six packages.)

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use prometheus::IntCounter;
use tracing_subscriber::fmt::MakeWriter;

/// Most bytes of lines that wait to be written.
const MAX_WAITING_BYTES: usize = 256 << 10;
/// Longest wait for the last lines to be written when the program ends.
const LAST_LINES: Duration = Duration::from_secs(1);
/// How long the writer rests when a non-blocking output takes no more.
const OUTPUT_REST: Duration = Duration::from_millis(10);

enum Message {
    Line(Vec<u8>),
    /// Answered once every line before it was written.
    Flush(SyncSender<()>),
}

/// Hands lines to the thread that writes them; never waits. Clones share the queue.
#[derive(Clone)]
pub(super) struct LineQueue {
    sender: Sender<Message>,
    waiting_bytes: Arc<AtomicUsize>,
    lost: IntCounter,
}

/// Waits when dropped until the lines so far were written, for at most [`LAST_LINES`].
pub(super) struct LastLines(LineQueue);

impl LineQueue {
    /// Starts the thread that writes lines to `output`, and counts the lost ones in `lost`.
    pub(super) fn start(output: impl Write + Send + 'static, lost: IntCounter) -> io::Result<Self> {
        let (sender, messages) = channel();
        let queue = Self { sender, waiting_bytes: Arc::default(), lost };
        let (waiting_bytes, lost) = (Arc::clone(&queue.waiting_bytes), queue.lost.clone());
        let run = move || write_lines(output, &messages, &waiting_bytes, &lost);
        std::thread::Builder::new().name("bvit-log".to_owned()).spawn(run)?;
        Ok(queue)
    }

    pub(super) fn last_lines(&self) -> LastLines {
        LastLines(self.clone())
    }

    fn push(&self, line: &[u8]) {
        let waiting = self.waiting_bytes.fetch_add(line.len(), Ordering::Relaxed);
        let fits = waiting + line.len() <= MAX_WAITING_BYTES;
        if !fits || self.sender.send(Message::Line(line.to_vec())).is_err() {
            self.waiting_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            self.lost.inc();
        }
    }
}

/// The subscriber writes each line with one call.
impl Write for LineQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LineQueue {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Drop for LastLines {
    fn drop(&mut self) {
        let (reply, done) = sync_channel(1);
        if self.0.sender.send(Message::Flush(reply)).is_ok() {
            // Lines that are not written by then stay unwritten: the program ends.
            let _ = done.recv_timeout(LAST_LINES);
        }
    }
}

/// Standard output without a buffer of the process: what is written has left it.
pub(super) fn standard_output() -> io::Result<File> {
    io::stdout().as_fd().try_clone_to_owned().map(File::from)
}

fn write_lines(mut output: impl Write, messages: &Receiver<Message>, waiting_bytes: &AtomicUsize, lost: &IntCounter) {
    // Whether the output ends in mid-line, because it took a part and refused the rest.
    let mut is_torn = false;
    while let Ok(message) = messages.recv() {
        match message {
            Message::Line(line) => {
                let begun = if is_torn { write_whole(&mut output, b"\n").map_err(|_| true) } else { Ok(()) };
                let done = begun.and_then(|()| write_whole(&mut output, &line).map_err(|written| written > 0));
                is_torn = done.is_err_and(|torn| {
                    lost.inc();
                    torn
                });
                waiting_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            }
            Message::Flush(done) => {
                let _ = done.try_send(());
            }
        }
    }
}

/// Writes all bytes, or says how many were written when the output refused the rest.
fn write_whole(output: &mut impl Write, bytes: &[u8]) -> Result<(), usize> {
    let mut written = 0;
    while written < bytes.len() {
        match output.write(&bytes[written..]) {
            Ok(0) => return Err(written),
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(OUTPUT_REST),
            Err(_) => return Err(written),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// An output that takes so many bytes before it stands still or refuses.
    #[derive(Clone)]
    struct Output {
        taken: Arc<Mutex<Vec<u8>>>,
        /// What each further write does; taken one by one, then everything is accepted.
        script: Arc<Mutex<Vec<io::Result<usize>>>>,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut script = self.script.lock().unwrap();
            let step = if script.is_empty() { Ok(bytes.len()) } else { script.remove(0) };
            let count = step?.min(bytes.len());
            self.taken.lock().unwrap().extend(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(script: Vec<io::Result<usize>>, lines: &[&str]) -> (String, u64) {
        let output = Output { taken: Arc::default(), script: Arc::new(Mutex::new(script)) };
        let lost = IntCounter::new("lost", "lost").unwrap();
        let queue = LineQueue::start(output.clone(), lost.clone()).unwrap();
        lines.iter().for_each(|line| queue.push(line.as_bytes()));
        drop(queue.last_lines());
        let text = String::from_utf8(output.taken.lock().unwrap().clone()).unwrap();
        (text, lost.get())
    }

    #[test]
    fn a_line_that_is_refused_in_the_middle_spoils_no_other() {
        let full = || Err(ErrorKind::StorageFull.into());
        let lines = ["first\n", "second\n", "third\n"];
        assert_eq!(written(vec![], &lines), ("first\nsecond\nthird\n".to_owned(), 0));
        assert_eq!(written(vec![full()], &lines), ("second\nthird\n".to_owned(), 1));
        assert_eq!(written(vec![Ok(3), full()], &lines), ("fir\nsecond\nthird\n".to_owned(), 1));
        assert_eq!(written(vec![Ok(3), full(), full()], &lines), ("fir\nthird\n".to_owned(), 2));
        let slow = vec![Err(ErrorKind::WouldBlock.into()), Ok(1), Err(ErrorKind::Interrupted.into())];
        assert_eq!(written(slow, &lines), ("first\nsecond\nthird\n".to_owned(), 0));
    }

    #[test]
    fn a_reader_that_stands_still_costs_lines_and_no_time() {
        let (reader, writer) = io::pipe().unwrap();
        let lost = IntCounter::new("lost", "lost").unwrap();
        let queue = LineQueue::start(writer, lost.clone()).unwrap();
        let line = [b"x".repeat(1023).as_slice(), b"\n"].concat();
        let many = 10 * MAX_WAITING_BYTES / line.len();
        // Returns at all: nobody reads, and the pipe holds a fraction of this.
        (0..many).for_each(|_| queue.push(&line));
        assert!(lost.get() > 0 && (lost.get() as usize) < many, "{} of {many} lost", lost.get());
        let waiting = queue.waiting_bytes.load(Ordering::Relaxed);
        assert!(waiting <= MAX_WAITING_BYTES, "{waiting} bytes wait");
        drop(queue.last_lines());
        drop(reader);
    }
}
