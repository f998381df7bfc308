//! EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, in the variant without squeeze-and-excite) as a stem: which layers it
//! has, what its tensors are called, and its batch norms folded into the convolutions before them.

use anyhow::{Context, Result, ensure};
use model_core::config::{Activation, BackboneConfig, StemLayer, SubstrateConfig};
use model_core::image::{Preprocess, Resize};
use model_core::weights::{BackboneWeights, Linear, Norm, StemWeights};

use super::torch::Tensors;

/// What its batch norms add to a variance.
const BATCH_NORM_EPS: f64 = 1e-3;

/// A stage of blocks: how many, kernel, stride of the first, expansion, channels.
const STAGES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
];

/// A layer with the names of its convolution and its norm.
#[derive(Debug)]
pub(super) struct NamedLayer {
    pub(super) conv: String,
    pub(super) norm: String,
    pub(super) layer: StemLayer,
}

/// Sizes of the network; [`Shape::LITE0`] is the one that there are weights for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Stages that there are, from the first on.
    pub(super) stages: usize,
    /// All channels but those of pixels are divided by this.
    pub(super) divisor: usize,
}

impl Shape {
    pub(super) const LITE0: Self = Self { stages: 7, divisor: 1 };

    /// Features behind the last convolution.
    pub(super) const fn features(self) -> usize {
        1280 / self.divisor
    }

    /// All convolutions, first to last, of images of side `image_size`.
    pub(super) fn layers(self, image_size: usize) -> Vec<NamedLayer> {
        let mut layers = Layers { layers: Vec::new(), side: image_size };
        let narrow = |channels: usize| channels / self.divisor;
        let stem = ("_conv_stem".to_owned(), "_bn0".to_owned());
        layers.push(stem, (narrow(32), 3, 2, 1), Activation::Relu6, None);
        let (mut block, mut input) = (0, narrow(32));
        for (repeats, kernel, stride, expansion, output) in STAGES.into_iter().take(self.stages) {
            for repeat in 0..repeats {
                let first = layers.layers.len();
                let stride = if repeat == 0 { stride } else { 1 };
                let name = |layer: &str| format!("_blocks.{block}.{layer}");
                let hidden = input * expansion;
                if expansion > 1 {
                    let names = (name("_expand_conv"), name("_bn0"));
                    layers.push(names, (hidden, 1, 1, 1), Activation::Relu6, None);
                }
                let names = (name("_depthwise_conv"), name("_bn1"));
                layers.push(names, (hidden, kernel, stride, hidden), Activation::Relu6, None);
                // Where a block keeps side and channels, its input is added to its output.
                let residual = (stride == 1 && input == narrow(output)).then_some(first);
                let names = (name("_project_conv"), name("_bn2"));
                layers.push(names, (narrow(output), 1, 1, 1), Activation::None, residual);
                (block, input) = (block + 1, narrow(output));
            }
        }
        let head = ("_conv_head".to_owned(), "_bn1".to_owned());
        layers.push(head, (self.features(), 1, 1, 1), Activation::Relu6, None);
        layers.layers
    }
}

struct Layers {
    layers: Vec<NamedLayer>,
    side: usize,
}

impl Layers {
    fn push(
        &mut self,
        (conv, norm): (String, String),
        (channels, kernel, stride, groups): (usize, usize, usize, usize),
        activation: Activation,
        residual: Option<usize>,
    ) {
        let (padding, out) = same_padding(self.side, kernel, stride);
        self.side = out;
        let layer = StemLayer { channels, kernel, stride, padding, groups, norm: false, activation, residual };
        self.layers.push(NamedLayer { conv, norm, layer });
    }
}

/// TensorFlow's SAME padding, top, left, bottom and right, and the side of the output: the odd pixel lies below and behind.
fn same_padding(side: usize, kernel: usize, stride: usize) -> ([usize; 4], usize) {
    let out = side.div_ceil(stride);
    let all = ((out.max(1) - 1) * stride + kernel).saturating_sub(side);
    let before = all / 2;
    ([before, before, all - before, all - before], out)
}

/// Samples to values as it was trained: `(x - 127) / 128`.
pub(super) fn preprocess() -> Preprocess {
    Preprocess {
        resize: Resize::CenterCropBilinear,
        mean: [127.0 / 255.0; 3],
        std: [128.0 / 255.0; 3],
        // Twice the model's side: what is left of a photograph then goes through one more antialiased resizing.
        reduction: 2.0,
    }
}

/// A backbone without blocks, whose stem is all of the network but its last layer, in f32.
///
/// # Errors
/// When a tensor is missing or has another shape: the file is that of another network.
pub(super) fn backbone(tensors: &Tensors<'_>, shape: Shape, image_size: usize) -> Result<BackboneWeights> {
    let layers = shape.layers(image_size);
    let mut channels = 3;
    let mut stem = Vec::with_capacity(layers.len());
    for named in &layers {
        let conv = fold(tensors, named, channels);
        stem.push(StemWeights {
            conv: conv.context("these are not the weights of EfficientNet-Lite0")?,
            norm: None,
            step: None,
        });
        channels = named.layer.channels;
    }
    let config = BackboneConfig {
        image_size,
        stem: layers.iter().map(|named| named.layer).collect(),
        d_model: shape.features(),
        // Without blocks there is no hidden layer.
        d_ff: 1,
        num_layers: 0,
        num_heads: 1,
        substrates: SubstrateConfig::default(),
    };
    config.validate()?;
    Ok(BackboneWeights {
        config,
        stem,
        pos_embed: Vec::new(),
        blocks: Vec::new(),
        norm: Norm::default(),
        background: None,
    })
}

/// # Errors
/// When the last layer is missing or has another shape.
pub(super) fn head(tensors: &Tensors<'_>, shape: Shape, classes: usize) -> Result<Linear> {
    let read = || -> Result<Linear> {
        let weight = tensors.floats("_fc.weight", &[classes, shape.features()])?;
        Ok(Linear { weight: weight.into(), bias: tensors.floats("_fc.bias", &[classes])? })
    };
    read().context("these are not the weights of EfficientNet-Lite0")
}

/// A convolution with the norm behind it folded in: `gamma (W x - mean) / sqrt(var + eps) + beta`.
fn fold(tensors: &Tensors<'_>, named: &NamedLayer, input: usize) -> Result<Linear> {
    let NamedLayer { conv, norm, layer: StemLayer { channels, kernel, groups, .. } } = named;
    let own = input / groups;
    let weight = tensors.floats(&format!("{conv}.weight"), &[*channels, own, *kernel, *kernel])?;
    let of_norm = |part: &str| tensors.floats(&format!("{norm}.{part}"), &[*channels]);
    let (gamma, beta) = (of_norm("weight")?, of_norm("bias")?);
    let (mean, variance) = (of_norm("running_mean")?, of_norm("running_var")?);
    ensure!(variance.iter().all(|variance| *variance >= 0.0), "{norm}.running_var has a negative value");
    let scale: Vec<f64> =
        (0..*channels).map(|c| f64::from(gamma[c]) / (f64::from(variance[c]) + BATCH_NORM_EPS).sqrt()).collect();
    // From [channel, input channel, row, column] to [channel, row, column, input channel].
    let window = kernel * kernel;
    let mut folded = Vec::with_capacity(weight.len());
    for (weight, scale) in weight.chunks_exact(own * window).zip(&scale) {
        for tap in 0..window {
            folded.extend((0..own).map(|n| (f64::from(weight[n * window + tap]) * scale) as f32));
        }
    }
    let bias = (0..*channels).map(|c| (f64::from(beta[c]) - f64::from(mean[c]) * scale[c]) as f32);
    Ok(Linear { weight: folded.into(), bias: bias.collect() })
}

#[cfg(test)]
pub(super) mod tests {
    use model_core::random::SplitMix64;

    use super::super::torch::tests::file;
    use super::*;

    /// The first two stages, of an eighth of the channels.
    pub(in crate::import) const SMALL: Shape = Shape { stages: 2, divisor: 8 };

    /// A file of torch with random weights for a network of that shape.
    pub(in crate::import) fn random_file(shape: Shape, classes: usize) -> Vec<u8> {
        let mut random = SplitMix64::at(5, 0);
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        let mut channels = 3;
        for NamedLayer { conv, norm, layer } in shape.layers(16) {
            let dims = vec![layer.channels, channels / layer.groups, layer.kernel, layer.kernel];
            let spread = (dims[1..].iter().product::<usize>() as f64).powf(-0.5);
            tensors.push((
                format!("{conv}.weight"),
                dims.clone(),
                random.uniforms(dims.iter().product(), spread * 2.0),
            ));
            for (part, around) in [("weight", 1.5), ("bias", 0.3), ("running_mean", 0.0), ("running_var", 1.0)] {
                let mut values = random.uniforms(layer.channels, 0.2);
                values.iter_mut().for_each(|value| *value += around);
                tensors.push((format!("{norm}.{part}"), vec![layer.channels], values));
            }
            channels = layer.channels;
        }
        tensors.push(("_fc.weight".into(), vec![classes, channels], random.uniforms(classes * channels, 0.4)));
        tensors.push(("_fc.bias".into(), vec![classes], random.uniforms(classes, 0.1)));
        let strides = |shape: &[usize]| -> Vec<usize> {
            (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
        };
        let strided: Vec<_> = tensors.iter().map(|(_, shape, _)| strides(shape)).collect();
        let tensors = tensors.iter().zip(&strided);
        let tensors: Vec<_> =
            tensors.map(|((name, shape, values), strides)| (&**name, &**shape, &**strides, values.clone())).collect();
        file(&tensors)
    }

    #[test]
    fn the_layers_are_those_of_the_paper() {
        let layers = Shape::LITE0.layers(224);
        assert_eq!(layers.len(), 49);
        let residuals = layers.iter().filter(|named| named.layer.residual.is_some()).count();
        assert_eq!(residuals, 9);
        let mut side = 224;
        let mut multiplications = 0;
        let mut channels = 3;
        for NamedLayer { layer, .. } in &layers {
            side = layer.output_side(side).unwrap();
            multiplications += side * side * layer.channels * layer.window_len(channels);
            channels = layer.channels;
        }
        assert_eq!((side, channels), (7, 1280));
        // 407 million in the table of the authors, with the last layer.
        assert_eq!((multiplications + 1_280_000) / 1_000_000, 385);
        for side in [96, 128, 160, 192, 224] {
            let (padding, out) = same_padding(side, 3, 2);
            assert_eq!((padding, out), ([0, 0, 1, 1], side / 2));
        }
        assert_eq!(same_padding(5, 5, 1), ([2, 2, 2, 2], 5));
        assert_eq!(same_padding(15, 5, 2), ([2, 2, 2, 2], 8));
    }

    #[test]
    fn norms_are_folded_and_windows_turned() {
        let bytes = random_file(SMALL, 3);
        let tensors = Tensors::read(&bytes).unwrap();
        let weights = backbone(&tensors, SMALL, 16).unwrap();
        assert_eq!(weights.config.stem.len(), 1 + 2 + 3 + 3 + 1);
        let conv = &weights.stem[0].conv;
        let raw = tensors.floats("_conv_stem.weight", &[4, 3, 3, 3]).unwrap();
        let one = |part: &str| tensors.floats(&format!("_bn0.{part}"), &[4]).unwrap()[1];
        let scale = one("weight") / (one("running_var") + 1e-3).sqrt();
        // Channel 1, row 2, column 0, blue.
        let (got, expected) = (conv.weight.to_f32()[27 + (2 * 3) * 3 + 2], raw[27 + 2 * 9 + 2 * 3] * scale);
        assert!((got - expected).abs() < 1e-6, "{got} is not {expected}");
        assert!((conv.bias[1] - (one("bias") - one("running_mean") * scale)).abs() < 1e-6);
        assert_eq!(head(&tensors, SMALL, 3).unwrap().bias.len(), 3);
    }

    #[test]
    fn another_network_is_named() {
        let bytes = file(&[("conv1.weight", &[1], &[1], vec![1.0])]);
        let tensors = Tensors::read(&bytes).unwrap();
        let error = format!("{:#}", backbone(&tensors, Shape::LITE0, 160).unwrap_err());
        assert!(
            error.contains("not the weights of EfficientNet-Lite0: there is no tensor _conv_stem.weight"),
            "{error}"
        );
        let bytes = random_file(SMALL, 3);
        let error = format!("{:#}", backbone(&Tensors::read(&bytes).unwrap(), Shape::LITE0, 160).unwrap_err());
        assert!(error.contains("the shape [4, 3, 3, 3], not [32, 3, 3, 3]"), "{error}");
    }
}
