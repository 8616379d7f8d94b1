//! `status.images`: the largest images on the node (contract N-11). Pure.

use k8s_openapi::api::core::v1::ContainerImage;
use protocols::cri::v1;

const MAX_NAMES: usize = 5;

/// The `max` largest images, largest first, each with at most five names, digests before tags. `max` below 0 means all.
pub fn node_images(images: &[v1::Image], max: i32) -> Vec<ContainerImage> {
    let mut sorted: Vec<&v1::Image> = images.iter().collect();
    sorted.sort_by(|a, b| (b.size, &b.id).cmp(&(a.size, &a.id)));
    if let Ok(max) = usize::try_from(max) {
        sorted.truncate(max);
    }
    sorted.into_iter().map(node_image).collect()
}

fn node_image(image: &v1::Image) -> ContainerImage {
    let names: Vec<String> = image.repo_digests.iter().chain(&image.repo_tags).take(MAX_NAMES).cloned().collect();
    ContainerImage {
        names: Some(names).filter(|names| !names.is_empty()),
        size_bytes: Some(i64::try_from(image.size).unwrap_or(i64::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, size: u64, digests: &[&str], tags: &[&str]) -> v1::Image {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        v1::Image { id: id.into(), size, repo_digests: owned(digests), repo_tags: owned(tags), ..v1::Image::default() }
    }

    #[test]
    fn n11_largest_first_and_no_more_than_asked() {
        let images = [image("a", 1, &[], &["a"]), image("b", 3, &[], &["b"]), image("c", 3, &[], &["c"])];
        let names = |max| -> Vec<String> {
            node_images(&images, max).into_iter().flat_map(|i| i.names.unwrap_or_default()).collect()
        };
        assert_eq!(names(50), ["c", "b", "a"]);
        assert_eq!(names(-1), ["c", "b", "a"]);
        assert_eq!(names(2), ["c", "b"]);
        assert!(names(0).is_empty());
    }

    #[test]
    fn n11_five_names_digests_first() {
        let listed = node_images(&[image("a", 7, &["d1", "d2", "d3"], &["t1", "t2", "t3"])], 50);
        assert_eq!(listed[0].names.as_deref().unwrap(), ["d1", "d2", "d3", "t1", "t2"]);
        assert_eq!(listed[0].size_bytes, Some(7));
        assert_eq!(node_images(&[image("a", 7, &[], &[])], 50)[0].names, None);
    }
}
