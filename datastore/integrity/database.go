package integrity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io"
	"os"
	"slices"
)

// The format of a bbolt database: pages of one size, of which the first two are meta pages that are written alternately.
// The current meta page points to the root bucket, whose leaves hold buckets with roots of their own. Numbers have the byte
// order of the machine, which is little-endian on all machines that kedge supports.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	elementSize = 16 // of a branch: pos 4, ksize 4, pgid 8; of a leaf: flags 4, pos 4, ksize 4, vsize 4
	bucketSize  = 16 // root 8, sequence 8
	metaSize    = 64 // magic 4, version 4, page size 4, flags 4, root bucket 16, freelist 8, pages 8, txid 8, checksum 8

	magic   = 0xED0CDAED
	version = 2

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10

	bucketLeaf = 0x01 // flag of a leaf element

	noFreelist = ^uint64(0) // the freelist is not on disk; bbolt derives it from the pages in use

	// maxDepth bounds the height of a tree. The tree of the largest possible database has less than ten levels.
	maxDepth = 64
)

// meta is the content of the current meta page.
type meta struct {
	pageSize int64
	root     uint64
	freelist uint64
	pages    uint64 // number of pages, used or free
	txid     uint64
}

// database walks through a bbolt file. It reads the file instead of mapping it into memory: a file that is too short, or a
// read error of the disk, is an error here, and would be a signal in mapped memory.
type database struct {
	path string
	file io.ReaderAt
	size int64
	meta meta
	used []bool // by page

	// levels are used again for each page of the same depth in the tree: a database can have millions of pages, and it is
	// checked while the API server's garbage is collected too.
	levels [maxDepth + 2]level

	// content is called with each key and value of the top-level buckets, in order. Both are valid until it returns.
	content func(bucket string, key, value []byte) *Damage
}

// level is the memory for one page and its elements.
type level struct {
	data     []byte
	elements []element
}

// checkDatabase checks every page in use of a bbolt file, and calls content with every key and value.
func checkDatabase(path string, content func(bucket string, key, value []byte) *Damage) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	d := &database{path: path, file: f, size: st.Size(), content: content}
	if err := d.readMeta(); err != nil {
		return err
	}
	d.used = make([]bool, d.meta.pages)
	d.used[0], d.used[1] = true, true
	if err := d.walk(d.meta.root, bounds{}, 0, d.rootElement); err != nil {
		return err
	}
	return d.checkFreelist()
}

func (d *database) damaged(format string, args ...any) *Damage {
	return damaged(d.path, format, args...)
}

// readMeta finds the newer of the valid meta pages. One of the two may be invalid. Then the transaction of the other is the
// last one, and the log holds the later changes.
func (d *database) readMeta() error {
	if d.size == 0 {
		return d.damaged("is empty")
	}
	first, firstErr := d.metaAt(0)
	size := int64(os.Getpagesize())
	if firstErr == nil {
		size = first.pageSize
	}
	second, secondErr := d.metaAt(size)
	switch {
	case firstErr != nil && secondErr != nil:
		var bad *Damage
		if !errors.As(firstErr, &bad) {
			return firstErr
		}
		return d.damaged("does not begin with the header of a database")
	case firstErr != nil || secondErr == nil && second.txid > first.txid:
		d.meta = second
	default:
		d.meta = first
	}
	m := d.meta
	switch {
	case m.pages < 4 || m.pages > uint64(1)<<40:
		return d.damaged("has an impossible number of pages, %d", m.pages)
	case int64(m.pages)*m.pageSize > d.size:
		return d.damaged("is too short: it should have %d bytes, and has %d", int64(m.pages)*m.pageSize, d.size)
	}
	return nil
}

func (d *database) metaAt(offset int64) (m meta, err error) {
	b := make([]byte, pageHeader+metaSize)
	if _, err := d.file.ReadAt(b, offset); err != nil {
		if errors.Is(err, io.EOF) {
			return m, d.damaged("is too short: it has %d bytes", d.size)
		}
		return m, err
	}
	b = b[pageHeader:]
	le := binary.LittleEndian
	sum := fnv.New64a()
	sum.Write(b[:56])
	if le.Uint32(b) != magic || le.Uint32(b[4:]) != version || le.Uint64(b[56:]) != sum.Sum64() {
		return m, d.damaged("has an invalid meta page")
	}
	m = meta{pageSize: int64(le.Uint32(b[8:])), root: le.Uint64(b[16:]), freelist: le.Uint64(b[32:]), pages: le.Uint64(b[40:]), txid: le.Uint64(b[48:])}
	if m.pageSize < 512 || m.pageSize > 1<<20 || m.pageSize&(m.pageSize-1) != 0 {
		return m, d.damaged("has an invalid page size of %d bytes", m.pageSize)
	}
	return m, nil
}

// bounds limits the keys of a page: from low, inclusive, to high, exclusive. A nil bound does not limit.
type bounds struct{ low, high []byte }

// page is one page with its overflow pages.
type page struct {
	id    uint64
	depth int // of the level that has its data; 0 for the root
	flags uint16
	count int
	data  []byte // without the header
	slack int    // maximum number of unused bytes at the end
}

// read reads a page at a depth of the tree, and marks it as used. The page is valid until the next one of that depth is read.
func (d *database) read(id uint64, depth int) (page, error) {
	if id >= d.meta.pages {
		return page{}, d.damaged("points to page %d of %d", id, d.meta.pages)
	}
	if d.used[id] {
		return page{}, d.damaged("points to page %d twice", id)
	}
	at := &d.levels[depth]
	head := at.bytes(pageHeader)
	if _, err := d.file.ReadAt(head, int64(id)*d.meta.pageSize); err != nil {
		return page{}, err
	}
	le := binary.LittleEndian
	overflow := uint64(le.Uint32(head[12:]))
	if own := le.Uint64(head); own != id {
		return page{}, d.damaged("has page %d in the place of page %d", own, id)
	}
	if overflow >= d.meta.pages-id {
		return page{}, d.damaged("is too short for the %d overflow pages of page %d", overflow, id)
	}
	for i := id; i <= id+overflow; i++ {
		if d.used[i] {
			return page{}, d.damaged("uses page %d twice", i)
		}
		d.used[i] = true
	}
	flags, count := le.Uint16(head[8:]), int(le.Uint16(head[10:]))
	data := at.bytes(int(overflow+1) * int(d.meta.pageSize)) // head is a part of it
	if _, err := d.file.ReadAt(data, int64(id)*d.meta.pageSize); err != nil {
		return page{}, err
	}
	return page{id: id, depth: depth, flags: flags, count: count, data: data[pageHeader:], slack: int(d.meta.pageSize)}, nil
}

// bytes returns n bytes, whose content is that of an earlier page.
func (l *level) bytes(n int) []byte {
	l.data = slices.Grow(l.data[:0], n)[:n]
	return l.data
}

// element is one element of a page: a key with its value, or the first key of a child page.
type element struct {
	key, value []byte
	flags      uint32
	child      uint64
}

// elements decodes a page. bbolt writes a page in one piece: first the elements, then, without gaps and in the same order,
// the keys and values to which they point. So a change of any number in a page makes it inconsistent.
func (d *database) elements(p page, branch bool) ([]element, error) {
	le := binary.LittleEndian
	end := p.count * elementSize
	if end > len(p.data) {
		return nil, d.damaged("has %d elements in page %d, which is too small for them", p.count, p.id)
	}
	l := &d.levels[p.depth]
	l.elements = slices.Grow(l.elements[:0], p.count)[:p.count]
	all := l.elements
	for i := range all {
		at := i * elementSize
		b := p.data[at:]
		var e element
		var pos, ksize, vsize uint64
		if branch {
			pos, ksize, e.child = uint64(le.Uint32(b)), uint64(le.Uint32(b[4:])), le.Uint64(b[8:])
		} else {
			e.flags, pos, ksize, vsize = le.Uint32(b), uint64(le.Uint32(b[4:])), uint64(le.Uint32(b[8:])), uint64(le.Uint32(b[12:]))
		}
		if uint64(at)+pos != uint64(end) || uint64(end)+ksize+vsize > uint64(len(p.data)) {
			return nil, d.damaged("has element %d of page %d at a wrong position", i, p.id)
		}
		e.key = p.data[end : end+int(ksize) : end+int(ksize)]
		end += int(ksize)
		e.value = p.data[end : end+int(vsize) : end+int(vsize)]
		end += int(vsize)
		all[i] = e
	}
	if p.slack > 0 && pageHeader+end <= len(p.data)+pageHeader-p.slack {
		return nil, d.damaged("has more overflow pages for page %d than it fills", p.id)
	}
	return all, nil
}

// checkOrder checks that the keys of a page ascend and are within the bounds.
func (d *database) checkOrder(p page, all []element, in bounds) error {
	for i, e := range all {
		switch {
		case i == 0 && in.low != nil && bytes.Compare(e.key, in.low) < 0,
			i > 0 && bytes.Compare(all[i-1].key, e.key) >= 0,
			in.high != nil && bytes.Compare(e.key, in.high) >= 0:
			return d.damaged("has a key out of order in page %d", p.id)
		}
	}
	return nil
}

// walk visits the elements of the tree below a page, in the order of their keys.
func (d *database) walk(id uint64, in bounds, depth int, visit func(element) error) error {
	if depth > maxDepth {
		return d.damaged("has a tree of %d levels", depth)
	}
	p, err := d.read(id, depth)
	if err != nil {
		return err
	}
	switch p.flags {
	case leafPage:
		return d.leaf(p, in, visit)
	case branchPage:
	default:
		return d.damaged("has a page %d of the unknown type %#x", id, p.flags)
	}
	all, err := d.elements(p, true)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return d.damaged("has an empty page %d", id)
	}
	if err := d.checkOrder(p, all, in); err != nil {
		return err
	}
	for i, e := range all {
		below := bounds{low: e.key, high: in.high}
		if i+1 < len(all) {
			below.high = all[i+1].key
		}
		if err := d.walk(e.child, below, depth+1, visit); err != nil {
			return err
		}
	}
	return nil
}

func (d *database) leaf(p page, in bounds, visit func(element) error) error {
	all, err := d.elements(p, false)
	if err != nil {
		return err
	}
	if len(all) == 0 && in.low != nil {
		return d.damaged("has an empty page %d", p.id)
	}
	if err := d.checkOrder(p, all, in); err != nil {
		return err
	}
	for _, e := range all {
		if err := visit(e); err != nil {
			return err
		}
	}
	return nil
}

// rootElement checks one top-level bucket.
func (d *database) rootElement(e element) error {
	if e.flags != bucketLeaf || len(e.value) < bucketSize {
		return d.damaged("has %q in the place of a bucket", e.key)
	}
	name, root := string(e.key), binary.LittleEndian.Uint64(e.value)
	visit := func(e element) error {
		if e.flags != 0 {
			return d.damaged("has a key of the unknown type %#x in bucket %s", e.flags, name)
		}
		if bad := d.content(name, e.key, e.value); bad != nil {
			return bad
		}
		return nil
	}
	if root != 0 {
		if len(e.value) != bucketSize {
			return d.damaged("has a bucket %s that is both inline and on a page of its own", name)
		}
		return d.walk(root, bounds{}, 1, visit)
	}
	// A small bucket is a page inside the value of its element. Its page ID is zero and not used.
	inline := e.value[bucketSize:]
	if len(inline) < pageHeader || binary.LittleEndian.Uint16(inline[8:]) != leafPage {
		return d.damaged("has a bucket %s that cannot be decoded", name)
	}
	return d.leaf(page{depth: 1, flags: leafPage, count: int(binary.LittleEndian.Uint16(inline[10:])), data: inline[pageHeader:]}, bounds{}, visit)
}

// checkFreelist checks the list of free pages, if there is one on disk. etcd writes none on Linux.
func (d *database) checkFreelist() error {
	if d.meta.freelist == noFreelist {
		return nil
	}
	p, err := d.read(d.meta.freelist, 0)
	if err != nil {
		return err
	}
	if p.flags != freelistPage {
		return d.damaged("has no list of free pages in page %d", p.id)
	}
	le := binary.LittleEndian
	count, at := uint64(p.count), 0
	if count == 0xFFFF { // the first entry then holds the number of the others
		count, at = le.Uint64(p.data), 8
	}
	if count > uint64(len(p.data)-at)/8 {
		return d.damaged("has a list of %d free pages in page %d, which is too small for it", count, p.id)
	}
	for i := range int(count) {
		id := le.Uint64(p.data[at+8*i:])
		if id >= d.meta.pages || d.used[id] {
			return d.damaged("has page %d both in use and free", id)
		}
		d.used[id] = true
	}
	return nil
}
