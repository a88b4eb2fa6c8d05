package stack

// HeaderLen is the length, in octets, of the header in front of every frame that
// crosses a Device: struct virtio_net_hdr of Linux (include/uapi/linux/virtio_net.h),
// little-endian, without num_buffers.
//
//	0 flags · 1 gso_type · 2 hdr_len · 4 gso_size · 6 csum_start · 8 csum_offset
const HeaderLen = 10

// What a Device may find in the header of a frame that is written to it. The bits
// are those of TUNSETOFFLOAD (include/uapi/linux/if_tun.h).
const (
	OffloadChecksum = 0x01 // flags may be VIRTIO_NET_HDR_F_NEEDS_CSUM
	OffloadTSO4     = 0x02 // gso_type may be VIRTIO_NET_HDR_GSO_TCPV4
	OffloadTSO6     = 0x04 // gso_type may be VIRTIO_NET_HDR_GSO_TCPV6
	OffloadUSO      = 0x60 // gso_type may be VIRTIO_NET_HDR_GSO_UDP_L4 (both families)
)

// A Device carries Ethernet frames, each behind a header of HeaderLen octets. One
// queue of a TAP is one; devices stack, so that a capture or a lossy link is a Device
// around a Device. One that also has FD() int, a descriptor that is readable when there is a frame, is lingered
// on (linger.go).
type Device interface {
	// Read fills vec with the next frame and returns its length in octets, header
	// included. vec[0] has at least HeaderLen octets and the frame follows the header
	// without a gap, within and across the elements of vec. It never blocks: it returns
	// unix.EAGAIN when no frame is there. A frame longer than vec is cut off. Only one goroutine reads.
	Read(vec [][]byte) (int, error)

	// Wait blocks until Read may have something, and returns an error that wraps
	// os.ErrClosed once the device has been closed.
	Wait() error

	// Write sends one frame; vec together is the header and then the frame. vec and what it
	// refers to belong to the caller again on return. Any number of goroutines may write.
	Write(vec [][]byte) error

	// Offloads tells what Write accepts in a header, as Offload bits. With 0 the
	// header must be all zero.
	Offloads() uint32

	// Close makes Wait return, now and in future. Read and Write fail from then on.
	Close() error
}
