//! Writes the inputs that fuzzing starts from: valid ones, a folder for each target of `fuzz/`.

use std::fs;
use std::path::Path;

use model_core::config::ViTConfig;
use system_tests::fixtures::{backbone_artifact, expert_set_artifact};
use system_tests::server::{image, image_names, root};

fn main() -> std::io::Result<()> {
    let corpora =
        [("artifact", artifacts()), ("image", images()), ("multipart", multipart()), ("binary_tensors", tensors())];
    for (target, inputs) in corpora {
        let folder = root().join("fuzz/seeds").join(target);
        fs::create_dir_all(&folder)?;
        for (index, input) in inputs.iter().enumerate() {
            fs::write(folder.join(index.to_string()), input)?;
        }
        println!("{}: {} inputs", Path::new("fuzz/seeds").join(target).display(), inputs.len());
    }
    Ok(())
}

fn artifacts() -> Vec<Vec<u8>> {
    let config = ViTConfig::preset("tiny").expect("a preset");
    let (backbone, digest) = backbone_artifact(&config.backbone, 1);
    let set = expert_set_artifact(&config, digest, "set", 2);
    vec![backbone, set]
}

fn images() -> Vec<Vec<u8>> {
    let folders = ["model-core/tests/pictures", "model-core/tests/fixtures"].map(|folder| root().join(folder));
    let files = folders.iter().flat_map(|folder| folder.read_dir().expect("the folder is there")).flatten();
    let pictures =
        files.filter(|file| file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() < 1 << 16));
    let pictures = pictures.map(|file| std::fs::read(file.path()).expect("the file is there"));
    image_names().iter().map(|name| image(name)).chain(pictures).collect()
}

fn multipart() -> Vec<Vec<u8>> {
    let part = |head: &str, data: &[u8]| {
        [format!("--edge\r\nContent-Disposition: form-data; {head}\r\n\r\n").as_bytes(), data, b"\r\n"].concat()
    };
    let file = part("name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png", &image("test-00.png"));
    let more = part("name=\"other\"; filename*=UTF-8''b.jpg", &image("test-01.jpg"));
    let field = part("name=\"top_k\"", b"3");
    let end = b"--edge--\r\n".to_vec();
    vec![[&file[..], &end].concat(), [&field[..], &file, &more, &end].concat()]
}

fn tensors() -> Vec<Vec<u8>> {
    let framed = |json: String, tensor: &[u8]| [&(json.len() as u32).to_le_bytes(), json.as_bytes(), tensor].concat();
    let picture = image("test-00.png");
    let string = [&(picture.len() as u32).to_le_bytes(), &picture[..]].concat();
    let input = |name: &str, shape: &str, datatype: &str, size: usize| {
        format!(
            r#"{{"inputs":[{{"name":"{name}","shape":{shape},"datatype":"{datatype}","parameters":{{"binary_data_size":{size}}}}}],"outputs":[{{"name":"scores","parameters":{{"classification":3,"binary_data":true}}}}]}}"#
        )
    };
    vec![
        framed(input("image", "[1]", "BYTES", string.len()), &string),
        framed(input("pixels", "[1,8,8,3]", "UINT8", 192), &[7; 192]),
        framed(input("input", "[1,3,32,32]", "FP32", 12288), &[0; 12288]),
    ]
}
