//! The part of Python's pickle that a dictionary of tensors is made of.
//!
//! A pickle is a program for a stack machine, which may call any function of the Python that reads it. The machine here has
//! the instructions that torch writes for tensors, calls nothing, and knows no name but those of tensors and their storages:
//! a file that asks for more is refused with the name that it asked for. What it builds is bounded by the length of the
//! program, and tuples by [`MAX_DEPTH`], so that dropping them needs no deep stack.

use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};

/// Most tuples in one another; torch writes four.
const MAX_DEPTH: u32 = 16;
/// Most instructions of a program; torch writes some twenty for a tensor.
const MAX_INSTRUCTIONS: u32 = 1 << 20;

/// What a program leaves on the stack.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    /// True or false, which no tensor depends on.
    Bool,
    Int(i64),
    /// An integer of more than eight bytes.
    LongInt,
    Text(Rc<str>),
    Tuple(Rc<[Self]>, u32),
    /// Lists and dictionaries are shared by all that refer to them, as in Python: a number among the machine's.
    List(usize),
    Dict(usize),
    /// A name that was found among those of [`NAMES`].
    Name(&'static str),
    /// What a storage is known by, a tuple.
    Storage(Rc<[Self]>),
    Tensor(Rc<TensorRef>),
}

/// A tensor: a view of a storage.
#[derive(Debug)]
pub(super) struct TensorRef {
    /// The tuple that names the storage.
    pub(super) storage: Rc<[Value]>,
    /// First element, in elements.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Elements from one index of a dimension to the next.
    pub(super) strides: Vec<usize>,
}

/// Names that a dictionary of tensors needs.
const NAMES: [&str; 8] = [
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch.FloatStorage",
    "torch.LongStorage",
    "torch.DoubleStorage",
    "torch.HalfStorage",
    "torch.IntStorage",
    "torch.ByteStorage",
];

/// The machine that runs programs.
#[derive(Debug, Default)]
pub(super) struct Machine {
    stack: Vec<Value>,
    /// Where the stack ended at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
}

/// The bytes of a program that are still to be read.
#[derive(Debug)]
struct Program<'a> {
    rest: &'a [u8],
}

impl<'a> Program<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len).context("the file ends within its pickle")?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes were taken"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').context("the file ends within its pickle")?;
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).context("a name in the pickle is not UTF-8")
    }
}

fn name(module: &str, attribute: &str) -> Result<Value> {
    let path = format!("{module}.{attribute}");
    match NAMES.iter().find(|known| **known == path) {
        Some(known) => Ok(Value::Name(known)),
        None => {
            bail!("the pickle asks for {}, which is code and no tensor; nothing of it was run", path.escape_debug())
        }
    }
}

impl Machine {
    /// Runs the program at the start of `bytes`, and returns its value and the bytes behind it.
    ///
    /// # Errors
    /// When the program has an instruction or a name that tensors do not need, or ends early.
    pub(super) fn run<'a>(&mut self, bytes: &'a [u8]) -> Result<(Value, &'a [u8])> {
        let mut program = Program { rest: bytes };
        let mut instructions = 0;
        self.stack.clear();
        self.marks.clear();
        self.memo.clear();
        loop {
            let [instruction] = program.array()?;
            instructions += 1;
            ensure!(instructions <= MAX_INSTRUCTIONS, "the pickle has more than {MAX_INSTRUCTIONS} instructions");
            if instruction == b'.' {
                return Ok((self.pop()?, program.rest));
            }
            self.step(instruction, &mut program)?;
        }
    }

    /// The entries of a dictionary, in order.
    pub(super) fn entries(&self, dict: usize) -> &[(Value, Value)] {
        self.dicts.get(dict).map_or(&[], Vec::as_slice)
    }

    /// The values of a list.
    pub(super) fn values(&self, list: usize) -> &[Value] {
        self.lists.get(list).map_or(&[], Vec::as_slice)
    }

    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        ensure!(self.stack.len() > floor, "the pickle takes a value that is not there");
        self.stack.pop().context("the pickle takes a value that is not there")
    }

    fn since_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().context("the pickle goes back to a mark that is not there")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn top(&self) -> Result<&Value> {
        self.stack.last().context("the pickle looks at a value that is not there")
    }

    fn push_tuple(&mut self, values: Vec<Value>) -> Result<()> {
        let depth = |value: &Value| if let Value::Tuple(_, depth) = value { *depth } else { 0 };
        let depth = 1 + values.iter().map(depth).max().unwrap_or(0);
        ensure!(depth <= MAX_DEPTH, "the pickle has more than {MAX_DEPTH} tuples in one another");
        self.stack.push(Value::Tuple(values.into(), depth));
        Ok(())
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn step(&mut self, instruction: u8, program: &mut Program<'_>) -> Result<()> {
        match instruction {
            // PROTO
            0x80 => drop(program.take(1)?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'K' => self.stack.push(Value::Int(u8::from_le_bytes(program.array()?).into())),
            b'M' => self.stack.push(Value::Int(u16::from_le_bytes(program.array()?).into())),
            b'J' => self.stack.push(Value::Int(i32::from_le_bytes(program.array()?).into())),
            // LONG1
            0x8a => {
                let [len] = program.array()?;
                let bytes = program.take(len.into())?;
                self.stack.push(long(bytes));
            }
            // BINUNICODE
            b'X' => {
                let len = u32::from_le_bytes(program.array()?) as usize;
                let text = std::str::from_utf8(program.take(len)?).context("a text in the pickle is not UTF-8")?;
                self.stack.push(Value::Text(text.into()));
            }
            b'q' => self.remember(u8::from_le_bytes(program.array()?).into())?,
            b'r' => self.remember(u32::from_le_bytes(program.array()?))?,
            b'h' => self.recall(u8::from_le_bytes(program.array()?).into())?,
            b'j' => self.recall(u32::from_le_bytes(program.array()?))?,
            // GLOBAL
            b'c' => {
                let (module, attribute) = (program.line()?, program.line()?);
                self.stack.push(name(module, attribute)?);
            }
            _ => self.build(instruction)?,
        }
        Ok(())
    }

    /// The instructions that build values of others, and take nothing from the program.
    fn build(&mut self, instruction: u8) -> Result<()> {
        match instruction {
            b')' => self.push_tuple(Vec::new())?,
            b't' => {
                let values = self.since_mark()?;
                self.push_tuple(values)?;
            }
            // TUPLE1 to TUPLE3
            0x85..=0x87 => {
                let mut values = (0..instruction - 0x84).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                values.reverse();
                self.push_tuple(values)?;
            }
            b'}' => self.push_dict(),
            b']' => {
                self.stack.push(Value::List(self.lists.len()));
                self.lists.push(Vec::new());
            }
            b'a' | b'e' => {
                let values = if instruction == b'a' { vec![self.pop()?] } else { self.since_mark()? };
                let Value::List(list) = *self.top()? else { bail!("the pickle appends to what is no list") };
                self.lists[list].extend(values);
            }
            b's' | b'u' => {
                let values = if instruction == b'u' {
                    self.since_mark()?
                } else {
                    let value = self.pop()?;
                    vec![self.pop()?, value]
                };
                let Value::Dict(dict) = *self.top()? else {
                    bail!("the pickle sets an entry of what is no dictionary")
                };
                let pairs = values.chunks_exact(2);
                self.dicts[dict].extend(pairs.map(|pair| (pair[0].clone(), pair[1].clone())));
            }
            // BINPERSID
            b'Q' => {
                let Value::Tuple(id, _) = self.pop()? else { bail!("the pickle names a storage by what is no tuple") };
                self.stack.push(Value::Storage(id));
            }
            b'R' => self.reduce()?,
            // BUILD: attributes of a dictionary, of which a tensor needs none.
            b'b' => {
                self.pop()?;
                ensure!(matches!(self.top()?, Value::Dict(_)), "the pickle sets attributes of what is no dictionary");
            }
            other => bail!("the pickle has the instruction 0x{other:02x}, which no dictionary of tensors needs"),
        }
        Ok(())
    }

    fn remember(&mut self, number: u32) -> Result<()> {
        let value = self.top()?.clone();
        self.memo.insert(number, value);
        Ok(())
    }

    fn recall(&mut self, number: u32) -> Result<()> {
        let value = self.memo.get(&number).context("the pickle recalls a value that it did not keep")?;
        self.stack.push(value.clone());
        Ok(())
    }

    /// The two calls that a dictionary of tensors is built by.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        match (function, arguments) {
            (Value::Name("collections.OrderedDict"), Value::Tuple(arguments, _)) if arguments.is_empty() => {
                self.push_dict();
            }
            (Value::Name("torch._utils._rebuild_tensor_v2"), Value::Tuple(arguments, _)) => {
                let [Value::Storage(storage), Value::Int(offset), shape, strides, ..] = &*arguments else {
                    bail!("the pickle builds a tensor of what is no storage, offset, shape and strides")
                };
                let tensor = TensorRef {
                    storage: Rc::clone(storage),
                    offset: usize::try_from(*offset).context("the pickle has a negative offset")?,
                    shape: sizes(shape)?,
                    strides: sizes(strides)?,
                };
                ensure!(tensor.shape.len() == tensor.strides.len(), "the pickle has a tensor with a stride too few");
                self.stack.push(Value::Tensor(Rc::new(tensor)));
            }
            (Value::Name(name), _) => bail!("the pickle calls {name} in a way that no dictionary of tensors needs"),
            _ => bail!("the pickle calls what is no function"),
        }
        Ok(())
    }
}

/// Two's complement of so many bytes, little-endian.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::LongInt;
    }
    let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
    let mut whole = [fill; 8];
    whole[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(whole))
}

fn sizes(value: &Value) -> Result<Vec<usize>> {
    let Value::Tuple(values, _) = value else { bail!("the pickle has a tensor whose shape is no tuple") };
    ensure!(values.len() <= 8, "the pickle has a tensor of {} dimensions", values.len());
    let size = |value: &Value| match value {
        Value::Int(size) => usize::try_from(*size).context("the pickle has a tensor of negative size"),
        _ => bail!("the pickle has a tensor whose shape is no tuple of integers"),
    };
    values.iter().map(size).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn code_is_named_and_not_run() {
        let mut machine = Machine::default();
        // What `pickle.dumps` writes for an object whose `__reduce__` is `os.system("true")`.
        let error = machine.run(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.").unwrap_err();
        assert!(error.to_string().contains("posix.system, which is code"), "{error}");
        for odd in [&b"c\nOrderedDict\n."[..], b"ccollections\ndict\n.", b"ctorch.torch\nFloatStorage\n."] {
            assert!(machine.run(odd).unwrap_err().to_string().contains("which is code"));
        }
        // STACK_GLOBAL, INST and OBJ find names in other ways.
        for instruction in [0x93, b'i', b'o'] {
            let error = machine.run(&[instruction, b'.']).unwrap_err().to_string();
            assert!(error.contains("which no dictionary of tensors needs"), "{error}");
        }
    }

    #[test]
    fn values_of_every_instruction_come_out() {
        let mut machine = Machine::default();
        let (value, rest) = machine.run(b"\x80\x02}q\0(X\x01\0\0\0aK\x05X\x01\0\0\0bM\x01\x02u.rest").unwrap();
        let Value::Dict(dict) = value else { panic!("{value:?}") };
        let entries = machine.entries(dict);
        assert!(matches!(&entries[0], (Value::Text(name), Value::Int(5)) if &**name == "a"), "{entries:?}");
        assert!(matches!(&entries[1], (_, Value::Int(0x201))), "{entries:?}");
        assert_eq!(rest, b"rest");
        let (value, _) = machine.run(b"\x80\x02]q\0(\x8a\x02\xff\xffJ\xfe\xff\xff\xffNe.").unwrap();
        let Value::List(list) = value else { panic!("{value:?}") };
        assert!(matches!(machine.values(list), [Value::Int(-1), Value::Int(-2), Value::None]));
        assert!(matches!(machine.run(b"\x8a\x09\0\0\0\0\0\0\0\0\x01.").unwrap().0, Value::LongInt));
    }

    #[test]
    fn deep_tuples_and_stray_instructions_are_refused() {
        let mut machine = Machine::default();
        let deep = [&b"N"[..], &[0x85; 1000], b"."].concat();
        assert!(machine.run(&deep).unwrap_err().to_string().contains("tuples in one another"));
        for program in ["", ".", "t.", "R.", "h\u{1}.", "Ns.", "N(a.", "Nb.", "NQ.", "X\u{7f}", "K", "e.", "(}u."] {
            assert!(machine.run(program.as_bytes()).is_err(), "{program:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_a_sentence(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(Machine::default().run(&bytes));
        }
    }
}
