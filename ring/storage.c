#include "ring/storage.h"

#include <linux/magic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

/* Not in every version of linux/magic.h. */
#define BCACHEFS_MAGIC 0xca451a4e
#define EXFAT_MAGIC 0x2011bab0
#define JFS_MAGIC 0x3153464a
#define NTFS3_MAGIC 0x7366746e
#define XFS_MAGIC 0x58465342
#define ZFS_MAGIC 0x2fc12fc1

/* Overlayfs is not among them: it tells nobody what lies under it. */
static const uint32_t NEAR[] = {
    EXT4_SUPER_MAGIC, XFS_MAGIC, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC, BCACHEFS_MAGIC, MSDOS_SUPER_MAGIC, EXFAT_MAGIC,
    JFS_MAGIC,        NTFS3_MAGIC, ZFS_MAGIC,
};

static const uint32_t MEMORY[] = {TMPFS_MAGIC, RAMFS_MAGIC, HUGETLBFS_MAGIC};

/* Disks whose other end is on a network. */
static const unsigned int FAR_MAJORS[] = {43 /* nbd */, 147 /* drbd */};

static enum storage storage_of_disk(dev_t disk)
{
    for (size_t i = 0; i < sizeof(FAR_MAJORS) / sizeof(*FAR_MAJORS); i++)
        if (major(disk) == FAR_MAJORS[i])
            return STORAGE_FAR;
    return STORAGE_NEAR;
}

static bool has(const uint32_t *magics, size_t count, uint32_t magic)
{
    for (size_t i = 0; i < count; i++)
        if (magics[i] == magic)
            return true;
    return false;
}

enum storage storage_of(int fd)
{
    struct stat st;
    struct statfs fs;

    if (fstat(fd, &st) < 0)
        return STORAGE_STREAM;
    if (S_ISBLK(st.st_mode))
        return storage_of_disk(st.st_rdev);
    if (!S_ISREG(st.st_mode))
        return STORAGE_STREAM;
    if (fstatfs(fd, &fs) < 0)
        return STORAGE_FAR;
    if (has(MEMORY, sizeof(MEMORY) / sizeof(*MEMORY), (uint32_t)fs.f_type))
        return STORAGE_MEMORY;
    return has(NEAR, sizeof(NEAR) / sizeof(*NEAR), (uint32_t)fs.f_type) ? STORAGE_NEAR : STORAGE_FAR;
}
