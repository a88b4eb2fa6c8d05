package stack

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const ethernetLen = header.EthernetMinimumSize

// link is netstack's link endpoint over our devices. netstack's own fdbased cannot drive
// a TAP with a virtio-net header (it knows segmentation on sockets only) and its reader
// ends for good on a frame for somebody else.
//
// It claims that checksums of received packets have been verified, because the kernel
// says so for nearly all of them; those few of which the kernel says nothing are verified in
// reader.verify. It does not claim to compute checksums when sending: netstack would then leave
// them out of SYN-ACK and RST, which carry no GSO options.
type link struct {
	devs       []Device
	mac        atomic.Pointer[tcpip.LinkAddress]
	mtu        atomic.Uint32
	dispatcher atomic.Pointer[stack.NetworkDispatcher]
	offloads   uint32
	stats      *counters
	writes     sync.Pool                 // *frameWriter
	acks       atomic.Pointer[ackHolder] // nil: nothing is held back
}

func newLink(devs []Device, mac tcpip.LinkAddress, mtu int, stats *counters) *link {
	l := &link{devs: devs, stats: stats, offloads: devs[0].Offloads()}
	for _, d := range devs[1:] {
		l.offloads &= d.Offloads()
	}
	l.mac.Store(&mac)
	l.mtu.Store(uint32(mtu))
	l.writes.New = func() any { return new(frameWriter) }
	return l
}

func (l *link) can(offload uint32) bool { return l.offloads&offload == offload }

// dev picks the queue for a flow: the same one for each of its frames, or they would overtake each other.
func (l *link) dev(hash uint32) Device { return l.devs[hash%uint32(len(l.devs))] }

// frameWriter is what one frame on its way out needs, kept for the next one.
type frameWriter struct {
	header [HeaderLen + 118]byte // virtio, Ethernet, and for our own frames IP and transport
	vec    [][]byte
}

// WritePackets is stack.LinkEndpoint's. netstack does not use it: see WritePacket.
func (l *link) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	sent := 0
	for _, pkt := range list.AsSlice() {
		if err := l.WritePacket(pkt); err != nil {
			return sent, err
		}
		sent++
	}
	return sent, nil
}

// WritePacket sends what netstack has built: a virtio header in front, NEEDS_CSUM and the
// segment size where netstack left these to the device. It makes the link its own stack.QueueingDiscipline;
// netstack's would make a list of each packet, which is an allocation.
func (l *link) WritePacket(pkt *stack.PacketBuffer) tcpip.Error {
	w := l.writes.Get().(*frameWriter)
	h := vnetHeader{}
	if gso := pkt.GSOOptions; gso.Type != stack.GSONone && gso.NeedsCsum {
		h.flags = vnetNeedsCsum
		h.csumStart = ethernetLen + gso.L3HdrLen
		h.csumOffset = gso.CsumOffset
		h.hdrLen = uint16(pkt.HeaderSize())
		if pkt.Data().Size() > int(gso.MSS) {
			h.gsoSize = gso.MSS
			h.gsoType = vnetGSOTCPv4
			if gso.Type == stack.GSOTCPv6 {
				h.gsoType = vnetGSOTCPv6
			}
		}
	}
	h.encode(w.header[:HeaderLen])
	w.vec = append(w.vec[:0], w.header[:HeaderLen])
	views, offset := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if offset >= len(b) {
			offset -= len(b)
			continue
		}
		w.vec = append(w.vec, b[offset:])
		offset = 0
	}
	dev := l.dev(pkt.Hash)
	if acks := l.acks.Load(); acks != nil && pkt.TransportProtocolNumber == header.TCPProtocolNumber && l.hold(acks, dev, w) {
		clear(w.vec)
		l.writes.Put(w)
		return nil
	}
	err := dev.Write(w.vec)
	clear(w.vec)
	l.writes.Put(w)
	if err != nil {
		// A full or vanished device is a lossy wire: TCP repeats, and Run ends by the reader.
		l.stats.FramesOutDropped.Add(1)
		return &tcpip.ErrNoBufferSpace{}
	}
	l.stats.FramesOut.Add(1)
	return nil
}

// hold asks acks about the frame in w. The headers are gathered in w.header, which has room for those of every
// segment that can be held.
func (l *link) hold(acks *ackHolder, dev Device, w *frameWriter) bool {
	n, size := HeaderLen, HeaderLen
	for _, p := range w.vec[1:] {
		n += copy(w.header[n:], p)
		size += len(p)
	}
	return acks.take(dev, w.header[:n], size)
}

// What follows is the rest of stack.LinkEndpoint and stack.GSOEndpoint.

func (l *link) MTU() uint32                        { return l.mtu.Load() }
func (l *link) SetMTU(mtu uint32)                  { l.mtu.Store(mtu) }
func (*link) MaxHeaderLength() uint16              { return ethernetLen }
func (l *link) LinkAddress() tcpip.LinkAddress     { return *l.mac.Load() }
func (l *link) SetLinkAddress(a tcpip.LinkAddress) { l.mac.Store(&a) }
func (*link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}
func (l *link) IsAttached() bool                      { return l.dispatcher.Load() != nil }
func (*link) Wait()                                   {}
func (*link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (*link) Close()                                  {}
func (*link) SetOnCloseAction(func())                 {}

func (*link) AddHeader(pkt *stack.PacketBuffer) {
	header.Ethernet(pkt.LinkHeader().Push(ethernetLen)).Encode(&header.EthernetFields{
		SrcAddr: pkt.EgressRoute.LocalLinkAddress,
		DstAddr: pkt.EgressRoute.RemoteLinkAddress,
		Type:    pkt.NetworkProtocolNumber,
	})
}

func (*link) ParseHeader(pkt *stack.PacketBuffer) bool {
	b, ok := pkt.LinkHeader().Consume(ethernetLen)
	if ok {
		pkt.NetworkProtocolNumber = header.Ethernet(b).Type()
	}
	return ok
}

// GSOMaxSize leaves room for the headers in the 16 bits of an IP packet's length.
func (*link) GSOMaxSize() uint32 {
	return 65535 - header.IPv6MinimumSize - header.TCPHeaderMaximumSize
}

func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.can(OffloadChecksum | OffloadTSO4 | OffloadTSO6) {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}
