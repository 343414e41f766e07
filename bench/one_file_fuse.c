/* The yardstick: a libfuse3 server with one directory and one file of two bytes, direct_io as klpfs opens its files. */
#define FUSE_USE_VERSION 31
#include <errno.h>
#include <fuse.h>
#include <string.h>

static const char content[] = "1\n";

static int get_attributes(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	(void)fi;
	memset(st, 0, sizeof(*st));
	if (strcmp(path, "/") == 0) {
		st->st_mode = S_IFDIR | 0755;
		st->st_nlink = 2;
	} else if (strcmp(path, "/enabled") == 0) {
		st->st_mode = S_IFREG | 0644;
		st->st_nlink = 1;
		st->st_size = 4096;
	} else {
		return -ENOENT;
	}
	return 0;
}

static int open_file(const char *path, struct fuse_file_info *fi)
{
	if (strcmp(path, "/enabled") != 0)
		return -ENOENT;
	fi->direct_io = 1;
	return 0;
}

static int read_file(const char *path, char *buf, size_t size, off_t offset, struct fuse_file_info *fi)
{
	size_t left = offset < 2 ? 2 - (size_t)offset : 0;

	(void)path;
	(void)fi;
	if (left > size)
		left = size;
	memcpy(buf, content + (offset < 2 ? offset : 2), left);
	return (int)left;
}

static void *start(struct fuse_conn_info *conn, struct fuse_config *config)
{
	(void)conn;
	config->entry_timeout = config->attr_timeout = 3600;
	return NULL;
}

static const struct fuse_operations operations = {
	.init = start, .getattr = get_attributes, .open = open_file, .read = read_file,
};

int main(int argc, char **argv)
{
	return fuse_main(argc, argv, &operations, NULL);
}
