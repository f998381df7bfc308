//! Files of `torch.save` in the form before torch 1.6: magic number, protocol and sizes as pickles of their own, the
//! dictionary of tensors, the list of storages, and then the storages' bytes.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use model_core::artifact::{self, open_file};

use super::pickle::{Machine, TensorRef, Value};

/// Bytes of a file at most.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// How the first pickle begins: `0x1950a86a20f9469cfc6c`, an integer of ten bytes.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// Tensors of a file by name.
#[derive(Debug)]
pub(super) struct Tensors<'a> {
    tensors: HashMap<String, Rc<TensorRef>>,
    storages: HashMap<String, &'a [u8]>,
}

/// Reads a file, unless it is larger than any that holds weights for this.
///
/// # Errors
/// When it cannot be read or is too large.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let bytes = open_file(path).and_then(|file| file.metadata()).with_context(|| path.display().to_string())?.len();
    ensure!(bytes <= MAX_FILE_BYTES, "{}: it has {bytes} bytes; at most {MAX_FILE_BYTES} are read", path.display());
    artifact::read_file(path).with_context(|| path.display().to_string())
}

/// Type and number of values of the storage that a tuple names.
fn storage(id: &[Value]) -> Result<(&'static str, &str, usize)> {
    match id {
        [Value::Text(word), Value::Name(kind), Value::Text(key), _, Value::Int(count), ..] if &**word == "storage" => {
            Ok((kind, key, usize::try_from(*count).context("a storage has a negative size")?))
        }
        _ => bail!("a tensor's storage is named in a way that torch does not write"),
    }
}

fn value_bytes(kind: &str) -> Result<usize> {
    Ok(match kind {
        "torch.ByteStorage" => 1,
        "torch.HalfStorage" => 2,
        "torch.FloatStorage" | "torch.IntStorage" => 4,
        "torch.DoubleStorage" | "torch.LongStorage" => 8,
        _ => bail!("{kind} is no storage"),
    })
}

impl<'a> Tensors<'a> {
    /// The tensors in the bytes of a file.
    ///
    /// # Errors
    /// When the bytes are none of torch's, hold code, or end early.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self> {
        if bytes.starts_with(b"PK") {
            bail!(
                "it is a zip archive, the form of torch 1.6 and later; save it again with _use_new_zipfile_serialization=False"
            );
        }
        let rest = bytes.strip_prefix(MAGIC).context("it does not begin like a file of torch.save")?;
        let mut machine = Machine::default();
        let (protocol, rest) = machine.run(rest)?;
        ensure!(matches!(protocol, Value::Int(1001)), "its protocol is not 1001");
        let (_sizes, rest) = machine.run(rest)?;
        let (dict, rest) = machine.run(rest)?;
        let Value::Dict(dict) = dict else { bail!("it holds no dictionary of tensors") };
        let mut tensors = HashMap::new();
        for (name, value) in machine.entries(dict) {
            let (Value::Text(name), Value::Tensor(tensor)) = (name, value) else {
                bail!("its dictionary holds more than named tensors")
            };
            tensors.insert(name.to_string(), Rc::clone(tensor));
        }
        // What the storages are, by the tensors that look at them.
        let mut sizes = HashMap::new();
        for tensor in tensors.values() {
            let (kind, key, count) = storage(&tensor.storage)?;
            let size = (count, value_bytes(kind)?);
            let before = sizes.insert(key.to_owned(), size);
            let key = key.escape_debug();
            ensure!(
                before.is_none_or(|before| before == size),
                "two tensors say that the storage {key} has other sizes"
            );
        }
        let (keys, mut rest) = machine.run(rest)?;
        let Value::List(keys) = keys else { bail!("it has no list of storages") };
        let mut storages = HashMap::new();
        for key in machine.values(keys) {
            let Value::Text(key) = key else { bail!("its list of storages holds more than names") };
            let &(expected, bytes) = sizes.get(&**key).context("it holds a storage that no tensor looks at")?;
            let short = || format!("it ends within the storage {}", key.escape_debug());
            let (count, behind) = rest.split_first_chunk().with_context(short)?;
            let count = u64::from_le_bytes(*count);
            ensure!(count == expected as u64, "the storage {} has {count} values, not {expected}", key.escape_debug());
            let len = expected.checked_mul(bytes).with_context(short)?;
            let (values, behind) = behind.split_at_checked(len).with_context(short)?;
            storages.insert(key.to_string(), values);
            rest = behind;
        }
        Ok(Self { tensors, storages })
    }

    /// The values of a tensor of f32 with that shape, row-major whatever its strides are.
    ///
    /// # Errors
    /// When there is none, it has another shape or type, or its values are not all there or not finite.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensors.get(name).with_context(|| format!("there is no tensor {name}"))?;
        ensure!(tensor.shape == shape, "the tensor {name} has the shape {:?}, not {shape:?}", tensor.shape);
        let (kind, key, count) = storage(&tensor.storage)?;
        ensure!(kind == "torch.FloatStorage", "the tensor {name} is of {kind}, not of torch.FloatStorage");
        let bytes = self.storages.get(key).with_context(|| format!("the tensor {name} has no storage"))?;
        let last = shape.iter().zip(&tensor.strides).try_fold(tensor.offset, |last, (&size, &stride)| {
            last.checked_add(size.checked_sub(1)?.checked_mul(stride)?)
        });
        ensure!(last.is_some_and(|last| last < count), "the tensor {name} reaches beyond its storage");
        // No larger than the storage unless values are used again, and in any case of the shape that was asked for.
        let mut values = Vec::with_capacity(shape.iter().product());
        let mut index = vec![0; shape.len()];
        loop {
            let at = tensor.offset + index.iter().zip(&tensor.strides).map(|(i, stride)| i * stride).sum::<usize>();
            let value = bytes[at * 4..].first_chunk().context("the storage is shorter than it was said to be")?;
            values.push(f32::from_le_bytes(*value));
            // The last index varies fastest.
            let Some(axis) = (0..shape.len()).rev().find(|&axis| index[axis] + 1 < shape[axis]) else { break };
            index[axis] += 1;
            index[axis + 1..].fill(0);
        }
        ensure!(values.iter().all(|value| value.is_finite()), "the tensor {name} has a value that is not finite");
        Ok(values)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn int(value: usize) -> Vec<u8> {
        [b"J", &(value as i32).to_le_bytes()[..]].concat()
    }

    fn tuple(values: &[usize]) -> Vec<u8> {
        let values: Vec<u8> = values.iter().flat_map(|&value| int(value)).collect();
        [b"(", &values[..], b"t"].concat()
    }

    /// Name, shape, strides and the storage's values.
    pub(in crate::import) type Tensor<'a> = (&'a str, &'a [usize], &'a [usize], Vec<f32>);

    /// A file of torch with these tensors.
    pub(in crate::import) fn file(tensors: &[Tensor<'_>]) -> Vec<u8> {
        let mut dict = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
        let mut keys = b"\x80\x02](".to_vec();
        let mut data = Vec::new();
        for (i, (name, shape, strides, values)) in tensors.iter().enumerate() {
            let key = text(&i.to_string());
            let id = [
                &b"("[..],
                &text("storage"),
                b"ctorch\nFloatStorage\n",
                &key,
                &text("cpu"),
                &int(values.len()),
                b"NtQ",
            ]
            .concat();
            let hooks = b"\x89ccollections\nOrderedDict\n)R";
            let tensor = [
                b"ctorch._utils\n_rebuild_tensor_v2\n(",
                &id[..],
                &int(0),
                &tuple(shape),
                &tuple(strides),
                hooks,
                b"tR",
            ];
            dict.extend([text(name), tensor.concat()].concat());
            keys.extend(key);
            data.extend((values.len() as u64).to_le_bytes());
            data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        // An attribute of the dictionary, as torch gives it one of versions.
        dict.extend(b"u}X\x01\0\0\0vNsb.");
        keys.extend(b"e.");
        [MAGIC, b"\x80\x02M\xe9\x03.", b"\x80\x02}.", &dict, &keys, &data].concat()
    }

    #[test]
    fn tensors_come_out_row_major_whatever_their_strides() {
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let bytes = file(&[("a", &[2, 3], &[3, 1], values.clone()), ("b", &[2, 3], &[1, 2], values.clone())]);
        let tensors = Tensors::read(&bytes).unwrap();
        assert_eq!(tensors.floats("a", &[2, 3]).unwrap(), values);
        assert_eq!(tensors.floats("b", &[2, 3]).unwrap(), [0., 2., 4., 1., 3., 5.]);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let good = file(&[("a", &[2], &[1], vec![1.0, 2.0])]);
        for len in [0, 3, MAGIC.len(), MAGIC.len() + 9, good.len() - 1, good.len() - 12] {
            let error = Tensors::read(&good[..len]).unwrap_err().to_string();
            assert!(error.contains("ends within") || error.contains("does not begin"), "{len}: {error}");
        }
        let error = |bytes: &[u8], shape: &[usize]| {
            let tensors = Tensors::read(bytes).and_then(|tensors| tensors.floats("a", shape));
            tensors.unwrap_err().to_string()
        };
        assert!(error(b"PK\x03\x04", &[2]).contains("zip archive"));
        assert!(error(&good, &[3]).contains("has the shape [2], not [3]"));
        let beyond = file(&[("a", &[2], &[2], vec![1.0, 2.0])]);
        assert!(error(&beyond, &[2]).contains("beyond its storage"));
        let huge = file(&[("a", &[2], &[0x7fff_ffff], vec![1.0, 2.0])]);
        assert!(error(&huge, &[2]).contains("beyond its storage"));
        let infinite = file(&[("a", &[2], &[1], vec![1.0, f32::INFINITY])]);
        assert!(error(&infinite, &[2]).contains("not finite"));
        assert!(error(&file(&[]), &[2]).contains("no tensor a"));
        assert!(error(&file(&[("a", &[0], &[1], vec![])]), &[0]).contains("beyond its storage"));
        // Both tensors look at the storage 0, of which they say different things.
        let two = file(&[("a", &[2], &[1], vec![1.0, 2.0]), ("b", &[3], &[1], vec![1.0, 2.0, 3.0])]);
        let key = [text("1"), text("cpu")].concat();
        let at = two.windows(key.len()).position(|window| window == key).unwrap() + 5;
        let shared = [&two[..at], b"0", &two[at + 1..]].concat();
        assert!(error(&shared, &[2]).contains("the storage 0 has other sizes"));
        assert!(error(&[MAGIC, b"\x80\x02(K\x07t."].concat(), &[2]).contains("protocol is not 1001"));
        let endless = [MAGIC, &b"}".repeat(1 << 21)].concat();
        assert!(error(&endless, &[2]).contains("instructions"));
    }
}
