/* Deflate streams of one cluster, faster than with zlib; see native.h. */
#include <errno.h>
#include <libdeflate.h>

#include "qcow2/native.h"

int inflate_cluster(const uint8_t *stream, size_t stream_nbytes, uint8_t *cluster, size_t cluster_nbytes)
{
    struct libdeflate_decompressor *decompressor = libdeflate_alloc_decompressor();
    enum libdeflate_result result;

    if (!decompressor)
        return -ENOMEM;
    /* Without a place for the length, anything but exactly a cluster is an error. */
    result = libdeflate_deflate_decompress(decompressor, stream, stream_nbytes, cluster, cluster_nbytes, NULL);
    libdeflate_free_decompressor(decompressor);
    return result == LIBDEFLATE_SUCCESS ? 0 : -EINVAL;
}

ssize_t deflate_cluster(const uint8_t *cluster, size_t cluster_nbytes, int level, uint8_t *stream, size_t limit)
{
    struct libdeflate_compressor *compressor = libdeflate_alloc_compressor(level);
    size_t nbytes;

    if (!compressor)
        return -ENOMEM;
    nbytes = libdeflate_deflate_compress(compressor, cluster, cluster_nbytes, stream, limit);
    libdeflate_free_compressor(compressor);
    return (ssize_t)nbytes;
}
